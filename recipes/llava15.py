"""LLaVA-1.5, stage 2 (Liu et al. 2023, arXiv:2310.03744): 665k conversations; connector and language model train;
lr 2e-5, batch 128, one epoch, warm-up 3 %. For the paper's LoRA variant add --lora_r=128 --lora_alpha=256
--lora_dropout=0.05 --lr=2e-4 --connector_lr=2e-5.

    torchrun --nproc_per_node=8 train_sft.py recipes/llava15.py --init=runs/align --data=FILE --images=DIR

This recipe was never run: its data and weights are not in this project. The values are from the paper and its code.
"""

template = "vicuna_v1"
image_aspect = "pad"
batch_size = 128
max_len = 2048
max_tokens = 8192                                # the plan on 8 GPUs of 80 GB: 48 GiB each; 81 with 16384
epochs = 1.0
lr = 2e-5
warmup = 0.03
workers = 4
save_every = 500
eval_every = 0
sample_every = 0
