"""MaxText's pre-training with memopt's optimizers, where it is installed (extra `maxtext`)."""

import pytest

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]  # its own warnings
train = pytest.importorskip("maxtext.trainers.pre_train.train")

SMALL = {
    "base_emb_dim": 16,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "base_mlp_dim": 32,
    "base_num_decoder_layers": 2,
    "head_dim": 4,
    "vocab_size": 64,
    "max_target_length": 8,
    "per_device_batch_size": 1,
    "dataset_type": "synthetic",
    "attention": "dot_product",
    "dtype": "float32",
    "ici_fsdp_parallelism": 4,
    "ici_tensor_parallelism": 2,
    "checkpoint_period": 2,
    "async_checkpointing": False,
    "enable_goodput_recording": False,
    "monitor_goodput": False,
    "save_config_to_gcs": False,
    "tokenizer_type": "tiktoken",
}
OPTIONS = {"galore": {"rank": 2}}


def arguments(directory, **more):
    """A command line of MaxText."""
    given = SMALL | {"base_output_directory": directory, "run_name": "run"} | more
    return [f"{key}={value}" for key, value in given.items()]
