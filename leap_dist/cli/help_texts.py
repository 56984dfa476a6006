"""Texts of the help: what each command is for, with examples."""

from leap_dist.config.presets import PRESET_HELP

MAIN = """\
Meta-learn initializations with Leap, on Atari games, Omniglot or Multi-CV.

  {command} train            three Atari games, a few minutes
  {command} status RUN       how is it going?
  {command} evaluate --init RUN --init scratch      does it help?
  {command} enjoy REPORT --game qbert --out x.gif   how do the agents play?
  {command} export RUN --to sb3 --out policy        use it elsewhere

COMMAND --help shows the usual flags, COMMAND --help-all every flag.
"""

TRAIN = """\
Meta-train an initialization from the paths along which workers train.

examples:
  {command} train
  {command} train --preset fast --games pong freeway --run-dir runs/mine
  {command} train --preset paper --address auto --run-dir s3://bucket/x
  {command} train --run-dir runs/mine --resume --meta-updates 200

presets (`{command} presets` has the details):
""" + "".join(f"  {name:<11} {text}\n" for name, text in PRESET_HELP.items())

EVALUATE = """\
Train new agents from each initialization, on the same games with the same
seeds, and compare how they learn.

examples:
  {command} evaluate --init runs/mine --init scratch --out reports/mine
  {command} evaluate --init leap=runs/a --init tuned=runs/b/init.safetensors \\
      --init scratch --games breakout qbert --seeds 3 --out reports/three

The agents get the settings of the runs of all --init; where these differ, you
must choose with --preset, --config or flags. The same command continues an
interrupted evaluation; with other initializations or games, or more seeds, it
adds to it.
"""

STUDY = """\
Meta-train with every meta-learner on the same tasks and budget, and test each
initialization on held-out tasks.

examples:
  {command} study --tasks atari --preset figure4 --out studies/atari --yes
  {command} study --tasks omniglot --out studies/omniglot
  {command} study --tasks multi-cv --games mnist svhn cifar10 --out studies/b
  {command} plot studies/omniglot        (tables and figures of the results)

The same command continues an interrupted study; with other arms or groups, or
more seeds, it adds to it. Several processes may work on one study.
"""

EXIT_CODES = """\
exit codes: 0 done; 1 could not continue (the summary says why); 2 bad input;
            130 interrupted, and everything accepted is saved
"""

ENJOY = """\
Watch an agent play, and print its returns.

examples:
  {command} enjoy reports/mine --game qbert --out qbert.gif
  {command} enjoy runs/mine --game breakout --steps 200000 --out breakout.gif
  {command} enjoy scratch --game pong --steps 0

An evaluation keeps the agent of its first seed for each initialization and
game. A run or an initialization holds no agent, only the weights that agents
start from, so an agent is first trained for --steps. Without --out, a terminal
with 24-bit colors shows the play; elsewhere, only the returns are printed.
"""

COMPLETION = """\
Print a script for tab completion of the program leap-dist. It needs the extra
"completion": pip install ".[completion]" installs both.

example:
  leap-dist completion bash >> ~/.bash_completion
"""

OTHER_WORDS = {
    "compare": "evaluate",
    "continue": "train --resume",
    "learn": "train",
    "list": "games, presets or weights",
    "monitor": "status",
    "play": "enjoy",
    "record": "enjoy",
    "report": "plot",
    "resume": "train --resume",
    "run": "train",
    "test": "evaluate",
    "watch": "enjoy",
}
"""This maps words that people type instead of a command to the command that does what they mean."""
