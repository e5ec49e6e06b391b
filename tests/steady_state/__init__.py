"""After the swap all is as with stock `torch.compile`: results, errors, and what autograd shows of them."""
