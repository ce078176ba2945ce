"""Every private name of torch and Lightning that is touched, with the variants of their versions side by side."""
