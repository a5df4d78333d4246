"""What a trained run makes of images: representations, their distributions, tables and rankings of whole folders."""
