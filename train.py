"""Train a matcher: python3 train.py --config configs/config_train_megadepth.json [--key value ...]"""
import argparse
import json

from tools.cli import report_skipped, run
from tools.distributed import launch, leave
from training.config import SETTINGS, load_train_config
from training.curves import plot_losses
from training.trainer import train


def _train(job, config: dict) -> int:
    outcome, skipped = train(config, job)
    if not job.is_main:
        return 0
    print(f"{outcome}: checkpoints are in {config['save_path']}, the curves in {plot_losses(config['save_path'])}")
    return report_skipped(skipped, "pairs")


def main(argv=None) -> int:
    keys = ""
    for key, setting in SETTINGS.items():
        choices = f"{{{','.join(setting.choices)}}} " if setting.choices else ""
        keys += f"  --{key} {choices}({json.dumps(setting.default)})\n        {setting.help}\n"
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"keys (defaults in brackets):\n{keys}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="JSON file; any of its keys can be given as --key value")
    arguments, overrides = parser.parse_known_args(argv)
    config = load_train_config(arguments.config, overrides)
    return launch(_train, config["gpu"], config)


if __name__ == "__main__":
    leave(run(main))
