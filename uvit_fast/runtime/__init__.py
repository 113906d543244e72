"""What every room stands on: processes, devices, files, CUDA graphs, errors and their words. It knows no other room."""
