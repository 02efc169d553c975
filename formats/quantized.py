"""FP8 weights in Hugging Face folders: which forms can be read, and the conversion of weights from and to FP8.

In every form that is read here a weight is its e4m3 value times a scale. `weight_scale_inv` holds one scale for each
block of 128 x 128 (DeepSeek, Qwen3-8B-FP8; the last block of a row or column may be smaller), `weight_scale` one for
each row, for the tensor, or for each block (compressed-tensors, fbgemm_fp8).
"""

import torch

METHODS = ("fp8", "compressed-tensors", "fbgemm_fp8")  # quant_method of config.json
WEIGHT_SCALES = ("_scale_inv", "_scale")  # what follows the weight's name
ACTIVATION_SCALES = ("input_scale", "activation_scale", "input_scale_ub")  # fixed scales of activations, for inference
# tensors that only other quantizations have: GPTQ and AWQ, bitsandbytes, compressed-tensors' integers, MXFP4
FOREIGN = ("qweight", "qzeros", "g_idx", "absmax", "quant_map", "weight_packed", "weight_zero_point", "weight_blocks")
READABLE = ("F32", "BF16", "F16", "F8_E4M3")  # dtypes of weights
BLOCK = 128


def problem(config, stored):
    """Why this quantization cannot be read, or None. config: quantization_config of config.json, or None."""
    if config and config.get("quant_method") not in METHODS:
        return (f"quantization {config.get('quant_method')!r} is not supported, only {', '.join(METHODS)} with e4m3 "
                "weights")
    if config and config.get("weight_block_size", [BLOCK, BLOCK]) not in (None, [BLOCK, BLOCK]):
        return f"weight_block_size={config['weight_block_size']} is not supported, only {BLOCK} x {BLOCK}"
    for name, (_, _, dtype) in stored.items():
        if name.rsplit(".", 1)[-1] in FOREIGN or name.endswith(("weight", "bias")) and dtype not in READABLE:
            return (f"{name} ({dtype}) is of a quantization or precision that is not supported, only F32, BF16, F16, "
                    "and e4m3 weights with scales are")
        if dtype == "F8_E4M3" and not config:
            return f"{name} is in FP8, but config.json has no quantization_config that says how its scales are meant"
    return None


def scale_of(name, tensors):
    """The name of the scale that belongs to weight `name`, or None."""
    return next((name + suffix for suffix in WEIGHT_SCALES if name + suffix in tensors), None)


def fits(shape, scale_shape):
    """Whether a scale of this shape is one for the tensor, for each row, or for each block of a weight."""
    rows, columns = shape
    blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
    return scale_shape in ((), (1,), (1, 1), (rows,), (rows, 1), blocks)


def dequantize(part, scale, begin, n_rows):
    """Rows `begin` onwards of an FP8 weight with n_rows rows, in float32. scale: of the whole weight."""
    scale, rows = scale.float(), torch.arange(begin, begin + len(part))
    if scale.numel() == 1:
        scale = scale.reshape(1, 1)
    elif tuple(scale.shape) in ((n_rows,), (n_rows, 1)):
        scale = scale.reshape(-1, 1)[rows]
    else:
        scale = scale[rows // BLOCK].repeat_interleave(BLOCK, dim=1)[:, : part.shape[1]]
    return part.float() * scale


def quantize(weight):
    """(e4m3 weight, float32 weight_scale_inv) with one scale for each block of 128 x 128: amax / 448."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # (rows / 128, 128, columns / 128, 128)
    amax = blocks.abs().amax(dim=(1, 3))
    scale = torch.where(amax > 0, amax / torch.finfo(torch.float8_e4m3fn).max, 1.0)
    scaled = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
    return scaled.clamp(-448, 448).to(torch.float8_e4m3fn), scale


def config_entry(left):
    """quantization_config for weights of quantize(). left: names of the linear layers that stay as they are."""
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": left}
