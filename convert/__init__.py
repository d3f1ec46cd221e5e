"""Hugging Face LFM2 checkpoint -> GGUF. The only package that knows Hugging Face names.

    from convert.hf_to_gguf import ConvertOptions, convert_hf_to_gguf
    path = convert_hf_to_gguf("LFM2-350M", ConvertOptions(outtype="bf16", outfile=Path("m.gguf"))).path
"""
