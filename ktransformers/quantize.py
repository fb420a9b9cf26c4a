"""`python -m ktransformers.quantize`, the name of `ktransformers.gguf_files.write` that scripts know."""

from ktransformers.gguf_files.write import choose_type, main, quantize_folder

__all__ = ["choose_type", "main", "quantize_folder"]

if __name__ == "__main__":
    main()
