"""Runs in nncodec's own environment (it wants numpy 1): codes arrays with nncodec 2.1.3 and says how many bytes it took.

    python nncodec_worker.py code IN.npz OUT_FOLDER '[{"qp": -32}, ...]'     float32 arrays; settings of nncodec.nn.encode
    python nncodec_worker.py integers IN.npz                                 int32 arrays: its arithmetic coder alone

Prints one JSON line. `code` writes what each setting decodes to as OUT_FOLDER/NUMBER.npz.
"""

import contextlib
import json
import os
import sys
import time

import numpy as np
import torch

# torchvision registers fake versions of two operators when imported, which fails where its compiled half is missing
_library = torch.library.Library("torchvision", "FRAGMENT")
with contextlib.suppress(RuntimeError):
    for _operator in ("nms", "qnms"):
        _library.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from nncodec.extensions import deepCABAC  # noqa: E402
from nncodec.nn import decode, encode  # noqa: E402
from nncodec.nnc_core.hdsp.hdsp_tool import HDSP_OPTS_OFF  # noqa: E402

UNARY = 10


def code(arrays, folder, settings):
    rows = []
    for number, setting in enumerate(settings):
        with contextlib.redirect_stdout(sys.stderr):
            start = time.perf_counter()
            stream = encode(dict(arrays), {"results": folder, "verbose": False, **setting})
            middle = time.perf_counter()
            decoded = decode(stream)
            end = time.perf_counter()
        missing = {k: v for k, v in arrays.items() if k not in decoded}
        if missing:
            raise SystemExit(f"not decoded: {list(missing)}")
        np.savez(os.path.join(folder, f"{number}.npz"), **decoded)
        rows.append({**setting, "bytes": len(stream), "encode_s": middle - start, "decode_s": end - middle})
    return rows


def integers(arrays):
    rows = {}
    for name, values in arrays.items():
        values = np.ascontiguousarray(values.astype(np.int32))
        best = None
        for optimise in (0, 1):
            for profile in (0, 1):
                skip = np.zeros(len(values), np.int32)
                if profile and values.ndim > 1:
                    skip = np.array([0 if row.any() else 1 for row in values], np.int32)
                start = time.perf_counter()
                coder = deepCABAC.Encoder()
                coder.initCtxModels(UNARY + 1, optimise)
                coder.encodeLayer(values, 0, 0, profile, 0, profile, skip, *HDSP_OPTS_OFF(), 0, 0)
                stream = np.asarray(coder.finish())
                middle = time.perf_counter()
                back = np.zeros_like(values)
                reader = deepCABAC.Decoder()
                reader.setStream(stream)
                reader.initCtxModels(UNARY + 1)
                reader.decodeLayer(back, 0, 0, profile, 0, *HDSP_OPTS_OFF(), 0, 0)
                end = time.perf_counter()
                row = {
                    "bytes": len(stream), "encode_s": middle - start, "decode_s": end - middle,
                    "optimise": optimise, "profile": profile, "exact": bool((back == values).all()),
                }
                if row["exact"] and (best is None or row["bytes"] < best["bytes"]):
                    best = row
        rows[name] = best
    return rows


def main():
    mode, path = sys.argv[1], sys.argv[2]
    torch.set_num_threads(1)
    with np.load(path) as found:
        arrays = {name: found[name] for name in found.files}
    answer = integers(arrays) if mode == "integers" else code(arrays, sys.argv[3], json.loads(sys.argv[4]))
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
