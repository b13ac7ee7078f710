"""`pgolf eval`: an existing artifact or checkpoint through any evaluator, and grids of them."""
