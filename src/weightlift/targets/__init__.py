"""Where tensors land: nowhere, in host memory, in existing parameters, or on another device through its framework."""
