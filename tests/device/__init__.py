"""What needs a CUDA device. Without one these tests are skipped."""
