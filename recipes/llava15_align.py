"""LLaVA-1.5, stage 1 (Liu et al. 2023, arXiv:2310.03744): 558k captions, only the connector learns, lr 1e-3, batch 256, one epoch.

    torchrun --nproc_per_node=8 train_align.py recipes/llava15_align.py --data=blip_laion_cc_sbu_558k.json --images=DIR

Not run here: no machine with the data was at hand. The numbers are the paper's and its scripts'."""

vision = "openai/clip-vit-large-patch14-336"
llm = "lmsys/vicuna-7b-v1.5"
template = "plain"
image_aspect = "pad"
batch_size = 256
max_len = 2048
max_tokens = 16384
epochs = 1.0
lr = 1e-3
warmup = 0.03
weight_decay = 0.0
workers = 4
save_every = 500
eval_every = 0
sample_every = 0
