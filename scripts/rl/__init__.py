"""Parts of scripts/rl_replay.py: settings, the task, rollouts, scoring, GRPO, the report."""
