"""Names of the providers that comparisons are about, as result files have them."""

FUSED = ("triton", "cuda", "cpu")
COMPILED = ("torch.compile", "torch.compile max-autotune")
OURS, OURS_SIMSIAM = "vi-simsiam", "vi-simsiam, method simsiam"
LIGHTLY = "lightly"
STEP, AT_HAND, NETWORK = "step", "step on views at hand", "network alone"
NETWORK_COMPILED, NETWORK_KERNELS = f"{NETWORK}, torch.compile", f"{NETWORK}, kernels"
