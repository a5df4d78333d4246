"""Operations: for each a plain-PyTorch reference, the dispatch to a backend, and the autograd
wrapper."""
