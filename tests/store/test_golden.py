"""Payloads written by the first version: later ones must read them, and must not drift without notice."""

import hashlib

import numpy as np
import pytest

from pared import store

I = np.arange(400, dtype=np.int64)
SAMPLES = {
    "dense": ((I * I * 7 + I * 3) % 23 % 9 - (I * 5 % 7) % 5).astype(np.int8).reshape(20, 20),
    "sparse": np.where((I * I + 3 * I) % 17 < 2, I % 5 - 2, 0).astype(np.int8).reshape(16, 25),
    "convolution": np.where(I[:270] % 4 == 1, I[:270] * I[:270] % 7 - 3, 0).astype(np.int16).reshape(10, 3, 3, 3),
    "bits": (I * I % 13 < 3).reshape(8, 50),
    "wide": (I[:40] * I[:40] * 29 % 1009 - 500).astype(np.int32),
    "far": I[:30] % 3 + np.iinfo(np.int64).min,
    "floats": ((I[:60] * 37 % 101 - 50) / 64).astype(np.float32),
    "special": np.array([np.nan, -0.0, np.inf, 5e-324, 1.5, -2.0], np.float64),
    "constant": np.full((3, 3), -2, np.int16),
    "half": np.full(5, 0.5, np.float16),
}
GOLDEN = [
    (
        "dense",
        "context",
        "f50093bf690153480172bccc0bedad361735ca3b07356350314b3b03c0dae3f5f9cd27f5d94c108decd59039d7e06b6f466db885d696"
        "a7055daed3520fa134aff6c22b7b4e496ee5526b13eaf64b570365baf16efabae26f240077cf8ad8cc951896b16a7b52fb5ebbb59adb"
        "5272a1a3d760e3b772f141d2c3a2d15c48472c11ad8a3c5b8da5ec04ce3be188535910fb914853ce852a569ba9a08c0f6bf1012aa00e"
        "799d97468b7af30eb72e0a104440ad0a18033d95e15ca4757e3d1d",
    ),
    (
        "dense",
        "huffman",
        "f508655b4dac2850ac4e77fe54a1bbcbb8284e74d1bb2c106bb9310597a40ec8a51377fd665511fb0d7fe01453dbab32abd7c89da975"
        "219ceb40ca39f351984a3eabefb7e14e3fb09731520dadd3450a1589ceffca943779770509ce9a3765820d772620b2f481d914a26eff"
        "accaa23f61affc028a7b7566557af913b52ea4339d6819473e6a330947d57df6fc29c7f612e62a41b5ba68a142b139dff95286ef2ee0"
        "a139d346ecb041aee4c4165e903b22944ddff5995447ec30",
    ),
    (
        "dense",
        "rans",
        "f5011b6f5ae05c86e14a3e899bb903733fc69c372c5fef5e30950f39f3e95d298e036d4c183abe992aaa37b667d31bce292b2307dd4c"
        "849247bedb29a57b69899436a755e1d5146824b1c5e40df40cc18cfd067b9168136eb6e5fd17306e9da3eea224eccf0184afa0a4444d"
        "96f6a168b5a2ead045da60e0e67bf025d366378f986fe9b56454442d93668789d3d815832cb2de9778b7c7b66b25ff145754e8d5c5f9"
        "0e28f7888a4659d46ed9181a93cf5ad938cb91fba08a86",
    ),
    (
        "sparse",
        "context",
        "bc001ee429c5db0a5376192b5acc6d695c42fe77fc6b7c057d10800bd03ca440aeec71e5f84d12e546a53cd7922f96ef597ee62672a0"
        "c963",
    ),
    (
        "sparse",
        "huffman",
        "bcd246817544dd16547ce4d1e3cb268f1e593478f2c9a3c7964d1e3027272727272727272727272727272727272727",
    ),
    (
        "sparse",
        "packed",
        "1cb09026499222519204499234291225499224489322519224498234299224899224489324499128498224499a148992244912a44991"
        "28499224419a144992444912a44992a44894244192244d8a4449922409d2a44894244992204d8a2449a22409d2244952244a92204992"
        "2645a2244992046952244a922449902645922451920469922429122549902449932251922449823429122549",
    ),
    (
        "sparse",
        "rans",
        "bcd2468059a9e4a72845e900269dac07dc7e6e3c4b497054e85cdd8c96a5d8d8363636363636363636363636363636363600",
    ),
    (
        "sparse",
        "raw",
        "fe00000100000000000000ff0000020000000000fe00000000000000010000ff00000200000000000000000000fe0000010000ff0000"
        "0200000000000000000000fe0000010000ff00000000000000020000000000fe00000100000000000000ff0000020000000000fe0000"
        "0000000000010000ff00000200000000000000000000fe0000010000ff00000200000000000000000000fe0000010000ff0000000000"
        "0000020000000000fe00000100000000000000ff0000020000000000fe00000000000000010000ff00000200000000000000000000fe"
        "0000010000ff00000200000000000000000000fe0000010000ff00000000000000020000000000fe00000100000000000000ff000002"
        "0000000000fe00000000000000010000ff00000200000000000000000000fe0000010000ff00000200000000000000000000fe000001"
        "0000ff00000000000000020000000000fe00000100000000000000ff0000020000000000fe00000000000000010000ff000002000000"
        "00000000000000fe0000010000ff0000020000000000",
    ),
    ("convolution", "context", "dc0085e4b5ab1409abead9cc1e4a7c9a468bb9b6113a3069e595813de56669b29f224973c7"),
    ("convolution", "huffman", "dcd94206b5223e7ffffffffffffffff07d89f627d89f627d89f627d89f627d89f6"),
    ("convolution", "rans", "dcd9421de1fe11be1802cc03073fd18703c2689e2932f4abdc02569595f2"),
    ("bits", "context", "890069ba214d197e1bdd5daa8cf385bbd4fdb30777bb1ebf9bca628c5a5352c8"),
    ("bits", "huffman", "89c24e829dee50c033333333333333333333333333333320"),
    ("bits", "rans", "89c24e803ceb2cb300ddf64b5ca98640f723c020cc"),
    (
        "wide",
        "huffman",
        "03ef03d401e1c3ca78140f0b9e080f0407b3c20785cf1278283cc794f1e7848f146844d0406850d9a1c34c68a3424694d0f1a1534082"
        "68c34149a0a0d4681e4d089a24d31a090d05268a30c31cfa2c32147ea1f4934c0f3d0a1d5d9771d95acd84ef8df9fd2f",
    ),
    (
        "wide",
        "packed",
        "5403ef001d7405d0d5239c4f4b72e28c617fd769353b7bf5a997ce30ccb1c11aad6b72b32ee3d2fb5efbd24049776c5539deb20594",
    ),
    (
        "wide",
        "planes",
        "3a2e000c298011dce12fa85b577eee986d8be37541478701b5a3da3cd8bdcd26b9777ebf3aefde076a07de8041c07e01f9e00faf2a8f"
        "771bff43d261008041c07807f67e49bf351e008041c07807f67e49bf351e00",
    ),
    (
        "wide",
        "rans",
        "03ef03d401e0e71780a1c17e041c0839f04382fc2781471b8bc3f825c2b823c083829de0e71b85704b8bc1ee0af0107867029e051cb8"
        "0f3c11e13c6e049c0a78560520a8142f042b49d57db26d6e53a75dc411c6d1edd7ab85e436e103",
    ),
    (
        "wide",
        "raw",
        "0cfeffff29feffff80feffff11ffffffdcffffffe10000002ffeffffa8ffffff5b01000057ffffff7e010000eeffffff98feffff6d01"
        "00008b000000e3ffffff75ffffff41ffffff47ffffff87ffffff01000000b5000000a3010000dafeffff3c000000d8010000bdffffff"
        "cd01000026000000b9feffff770100007e000000bfffffff3affffffeffeffffdefeffff07ffffff6affffff07000000de000000",
    ),
    ("far", "context", "0000000000000004000000000000001eb08d17554abcf8"),
    ("far", "huffman", "0000000000000004000000000000001e88e8b5ad6b5ad6b580"),
    ("far", "packed", "140000000000000004000000000000001c2449922449922409"),
    ("far", "planes", "7fea318c63108a0458b641197353fa6d888888888888042200"),
    ("far", "rans", "0000000000000004000000000000001e8116b641197353fa6d"),
    (
        "far",
        "raw",
        "000000000000008001000000000000800200000000000080000000000000008001000000000000800200000000000080000000000000"
        "008001000000000000800200000000000080000000000000008001000000000000800200000000000080000000000000008001000000"
        "000000800200000000000080000000000000008001000000000000800200000000000080000000000000008001000000000000800200"
        "000000000080000000000000008001000000000000800200000000000080000000000000008001000000000000800200000000000080"
        "000000000000008001000000000000800200000000000080",
    ),
    (
        "floats",
        "planes",
        "ef228901f0096977a5252d6968008890a080408010e0c06040107840b0280028b04078104060c0e010804080a090c070480008f08058"
        "50008060a0300020c0207020306800d01800389080808638432b08f0cdc264a535878ef22b29a3e8b3844dbdf6",
    ),
    (
        "floats",
        "raw",
        "000048bf000050be0000c03e000020bf000040bd0000083f0000f0be0000e03d0000303f0000a0be0000883e00003cbf000020be0000"
        "d83e000014bf000000000000143f0000d8be0000203e00003c3f000088be0000a03e000030bf0000e0bd0000f03e000008bf0000403d"
        "0000203f0000c0be0000503e0000483f000060be0000b83e000024bf000080bd0000043f0000f8be0000c03d00002c3f0000a8be0000"
        "803e000040bf000030be0000d03e000018bf000080bc0000103f0000e0be0000103e0000383f000090be0000983e000034bf000000be"
        "0000e83e00000cbf0000003d00001c3f0000c8be0000403e",
    ),
    ("special", "planes", "fe5a318c408a045801751d8888888888f000e000f000ff00ff007f80"),
    (
        "special",
        "raw",
        "000000000000f87f0000000000000080000000000000f07f0100000000000000000000000000f83f00000000000000c0",
    ),
    ("constant", "constant", "fe"),
    ("constant", "context", "b8"),
    ("constant", "huffman", "b8"),
    ("constant", "packed", "04b0"),
    ("constant", "planes", "73020480020680"),
    ("constant", "rans", "b8"),
    ("constant", "raw", "fefffefffefffefffefffefffefffefffeff"),
    ("half", "constant", "38"),
]


def interleaved() -> np.ndarray:
    places = np.arange(140_001, dtype=np.int64)
    return (places * places % 10_007 % 19 % 11 - 5).astype(np.int8)


def floats() -> np.ndarray:
    """Float32 whose last bits are noise, then zero, and whose scale changes: blocks of every mode."""
    values = interleaved().astype(np.float32) * np.float32(0.125)
    values[100_000:] *= np.float32(2.0**-30)
    noise = (np.arange(140_001, dtype=np.uint64) * np.uint64(2_654_435_761) >> np.uint64(7)).astype(np.uint32) & np.uint32(0x7FFF)
    noise[70_000:] = 0
    return (values.view(np.uint32) ^ noise).view(np.float32)


@pytest.mark.parametrize(("sample", "coder", "payload"), GOLDEN)
def test_a_payload_of_the_first_version_is_read_and_written_bit_for_bit(sample, coder, payload):
    values = SAMPLES[sample]
    restored = store.decode(coder, bytes.fromhex(payload), values.shape, values.dtype)
    assert restored.dtype == values.dtype and restored.tobytes() == values.tobytes()
    assert store.encode(values, coder) == (coder, bytes.fromhex(payload))


@pytest.mark.parametrize(
    ("coder", "digest"),
    [
        ("rans", "fc177f176687948b5a476c8ceb35dbc0"),
        ("huffman", "3c7758dd07ca60b27f15abcaded5de56"),
        ("packed", "90e1e02e7dbe4e09d88bcb21358fefa0"),
        ("context", "9e6e50c406d29ff0ba70622a2b5a3487"),
        ("planes", "e432adfca4f1800615027bac474609e3"),
    ],
)
def test_a_large_payload_is_written_as_by_the_first_version(coder, digest):
    values = floats() if coder == "planes" else interleaved()
    assert hashlib.sha256(store.encode(values, coder)[1]).hexdigest()[:32] == digest


def test_every_coder_has_a_golden_payload():
    assert {coder for _, coder, _ in GOLDEN} == set(store.names())
