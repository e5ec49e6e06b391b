"""All private names of torch that frame-swap uses, a module for each subsystem of torch.

No other package uses one; a test checks that. `probe` tells which of them a torch lacks. The other packages import
modules from here, not names, so that they can be imported if a name is missing.
"""
