"""All uses of private names of torch and Lightning, with variants for their supported versions."""
