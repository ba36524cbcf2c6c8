"""What the sub-commands of ``asr`` do; ``api/cli.py`` reads the command line."""
