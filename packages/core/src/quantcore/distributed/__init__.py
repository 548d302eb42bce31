"""Work that several processes share through torch.distributed."""
