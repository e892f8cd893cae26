"""Makes tests/goldens/transcoders with the real library; needs sae-lens (made with 6.54.12).

python tests/make_saelens_goldens.py
"""

from pathlib import Path

import numpy as np
import torch
from sae_lens.saes import transcoder

D_IN, D_OUT, WIDTH = 8, 5, 20
KINDS = {
    "transcoder": transcoder.Transcoder,
    "skip_transcoder": transcoder.SkipTranscoder,
    "jumprelu_transcoder": transcoder.JumpReLUTranscoder,
    "jumprelu_skip_transcoder": transcoder.JumpReLUSkipTranscoder,
}


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, D_IN)
    for name, kind in KINDS.items():
        config = {"d_in": D_IN, "d_sae": WIDTH, "d_out": D_OUT, "apply_b_dec_to_input": False}
        made = kind.from_dict(config).eval()
        with torch.no_grad():
            for parameter, value in made.named_parameters():
                value.copy_(0.5 * torch.randn_like(value))
                if parameter == "threshold":
                    value.abs_()
        folder = Path(__file__).parent / "goldens" / "transcoders" / name
        made.save_model(str(folder))
        with torch.no_grad():
            io = {"x": x, "acts": made.encode(x), "recon": made(x)}
        np.savez(folder / "io.npz", **{key: value.numpy() for key, value in io.items()})


if __name__ == "__main__":
    main()
