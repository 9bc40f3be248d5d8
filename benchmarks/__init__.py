"""Side by side: this book's layers, their bare parts, PyTorch's and Hugging Face's. `python -m benchmarks --help`."""
