"""The foundation of all rooms: processes, devices, files, CUDA graphs, errors, messages. It imports no other room."""
