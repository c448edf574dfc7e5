"""Limits of numbers: zeros that a trainer gives a meaning are legal, those that train nothing are not."""

import pytest
from trl import DistillationConfig, DPOConfig, GRPOConfig, KTOConfig, RLOOConfig

from buddygpt.cli.errors import UserError
from buddygpt.rlhf.kto import check_balance
from buddygpt.rlhf.pairs import CPOConfig, ORPOConfig
from buddygpt.training.limits import require_limits

OPTIONS = {"use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.mark.parametrize("config", [GRPOConfig, RLOOConfig, ORPOConfig, DistillationConfig])
def test_beta_may_be_0_if_the_loss_has_another_part(config, tmp_path):
    require_limits(config(output_dir=str(tmp_path), beta=0.0, **OPTIONS))
    with pytest.raises((UserError, ValueError), match="beta"):
        require_limits(config(output_dir=str(tmp_path), beta=-0.1, **OPTIONS))


@pytest.mark.parametrize("config", [DPOConfig, KTOConfig, CPOConfig])
def test_beta_may_not_be_0_if_the_loss_is_then_constant(config, tmp_path):
    with pytest.raises(UserError, match="`beta` is 0.0; use a number above 0"):
        require_limits(config(output_dir=str(tmp_path), beta=0.0, **OPTIONS))


def test_one_label_of_kto_may_weigh_nothing(tmp_path, capsys):
    args = KTOConfig(output_dir=str(tmp_path), undesirable_weight=0.0, **OPTIONS)
    require_limits(args)
    check_balance([True, False], args)
    assert not capsys.readouterr().err
