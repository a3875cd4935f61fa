"""LLaVA-1.5, stage 1 (Liu et al. 2023, arXiv:2310.03744): 558k captions; the connector trains; lr 1e-3, batch 256,
one epoch, warm-up 3 %. --vision is CLIP-L/14-336, --llm is Vicuna-7B v1.5, each a Hugging Face name or a folder.

    torchrun --nproc_per_node=8 train_align.py recipes/llava15_align.py --vision=openai/clip-vit-large-patch14-336 \\
        --llm=lmsys/vicuna-7b-v1.5 --data=FILE --images=DIR

This recipe was never run: its data and weights are not in this project. The values are from the paper and its code.
"""

template = "plain"
image_aspect = "pad"
batch_size = 256
max_len = 2048
max_tokens = 16384
epochs = 1.0
lr = 1e-3
warmup = 0.03
workers = 4
save_every = 500
eval_every = 0
sample_every = 0
