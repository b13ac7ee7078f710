"""`pgolf bundle`, `unbundle`, `submit` and `check`: from runs to a folder that others can judge. Not in any bundle.

Nothing here imports torch.
"""
