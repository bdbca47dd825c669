"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers. Frantar et al. 2022, arXiv
2210.17323."""

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from rankfold.core.calibration import Calibration, InputCovariance, Statistic
from rankfold.core.feedback import column_feedback
from rankfold.core.packed import Packed, Scheme, decode, encode, grouped, pack, rows_of
from rankfold.errors import RankfoldError
from rankfold.quantizers._quantizer import Quantizer
from rankfold.quantizers.rtn import ranges


class GPTQ(Quantizer):
    """Rounds column by column, and moves the columns that are still to come so that X Wᵀ changes least.

        min ‖X Wᵀ − X Ŵᵀ‖²,  H = XᵀX:  q_j = Q(w_j),  e = (w_j − q_j) / U_jj,  W[:, j:] ← W[:, j:] − e U[j, j:]

    with H⁻¹ = UᵀU after damping by `damping` of the mean of H's diagonal. Q has the scales of `rtn`, taken from the
    weights as they are when the group begins; in the published code they see the feedback of earlier blocks of 128
    columns only. Groups down a column get theirs when the column's turn comes. `act_order` takes columns with large
    inputs first; then in groups along the rows, and with `static_groups` in all, scales are those of the weights before
    any feedback, unless the scheme is `ordered`: its groups are of inputs that are taken one after the other.
    """

    slug: ClassVar[str] = "gptq"
    title: ClassVar[str] = "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
    source: ClassVar[str] = "arXiv 2210.17323"

    damping: Annotated[float, Field(gt=0, description="share of the mean of diag H that is added to it")] = 0.01
    block: Annotated[int, Field(ge=1, description="columns between two updates of all others")] = 128
    act_order: bool = False
    static_groups: bool = False

    def needs(self) -> tuple[Statistic[Any], ...]:
        return (InputCovariance(),)

    def quantise(self, W: Tensor, scheme: Scheme, statistics: Calibration | None, site: str) -> Packed:
        assert statistics is not None  # quantize collects what `needs` names
        H = statistics.get(InputCovariance(), site).to(W)
        if not H.any():
            raise RankfoldError(f"gptq: all inputs of {site} are zero in the calibration data")
        return self.rounded(W, H, scheme)

    def ranges(self, groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros of groups (rows, groups, g)."""
        return ranges(groups, scheme)

    def order(self, H: Tensor) -> Tensor:
        """The columns as they are taken."""
        if self.act_order:
            return H.diagonal().argsort(descending=True, stable=True)
        return torch.arange(len(H), device=H.device)

    def is_static(self, scheme: Scheme) -> bool:
        """Whether all scales are those of the weights before any feedback."""
        return self.static_groups or scheme.group == "tensor" or (self.act_order and scheme.along == "in")

    def rounded(self, W: Tensor, H: Tensor, scheme: Scheme) -> Packed:
        """W (out, in) with the second moment H (in, in) of its inputs."""
        if scheme.ordered:
            order = self.order(H)
            kept, plain = scheme.model_copy(update={"ordered": False}), self.model_copy(update={"act_order": False})
            return plain.rounded(W[:, order], H[order][:, order], kept)._replace(order=order.int())
        scales, zeros = self.ranges(grouped(rows_of(W, scheme), scheme), scheme)
        codes = torch.empty(scheme.layout(*W.shape)[:2], dtype=torch.uint8, device=W.device)
        order, static = self.order(H), self.is_static(scheme)
        places = order.tolist()

        def along_rows(j: int, M: Tensor) -> Tensor:
            """A column crosses every row: each has its scale, from the group that the column is in."""
            i = places[j]
            g = i // scheme.group if isinstance(scheme.group, int) else 0
            if isinstance(scheme.group, int) and i % scheme.group == 0 and not static:
                s, z = self.ranges(M[:, None, j : j + scheme.group], scheme)
                scales[:, g] = s[:, 0]
                if zeros is not None and z is not None:
                    zeros[:, g] = z[:, 0]
            s, z = scales[:, g, None], None if zeros is None else zeros[:, g, None]
            one = scheme.model_copy(update={"group": "channel"})
            q = encode(M[:, j, None], s, z, one)
            codes[:, i] = q[:, 0]
            return decode(q, s, z, one, M.dtype)[:, 0]

        def down_columns(j: int, M: Tensor) -> Tensor:
            """A column is a row of codes."""
            i, column = places[j], M[None, :, j]
            if scheme.group != "tensor" and not static:
                s, z = self.ranges(grouped(column, scheme), scheme)
                scales[i] = s[0]
                if zeros is not None and z is not None:
                    zeros[i] = z[0]
            at = 0 if scheme.group == "tensor" else i
            s, z = scales[at, None], None if zeros is None else zeros[at, None]
            q = encode(column, s, z, scheme)
            codes[i] = q[0]
            return decode(q, s, z, scheme, M.dtype)[0]

        group = scheme.group if isinstance(scheme.group, int) and scheme.along == "in" else 1
        block = -(-self.block // group) * group  # so that a group has all feedback when it begins
        change = along_rows if scheme.along == "in" else down_columns
        column_feedback(W[:, order], H[order][:, order], change, damping=self.damping, block=block)
        return Packed(pack(codes, scheme), scales, zeros)
