"""``asr``: transcribe files here, serve, look after models, measure.

    asr transcribe FILE... [--format text|json|srt|vtt] [--output DIR]
    asr serve
    asr models list|verify|pull
    asr bench
    asr settings [--env-example]

Exit codes: 0 all is well, 1 some file or model failed, 2 the command line or a setting is wrong, 3 the
service could not start, 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from api.errors import AsrError, BundleError, InstallationError, SettingsError
from api.settings import Settings, load_settings

OK, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter or a file's name that a terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        return int(parsed.run(parsed))
    except (SettingsError, InstallationError, BundleError, AsrError) as error:
        print(f"asr: {error}", file=sys.stderr)
        return WRONG if isinstance(error, SettingsError) else FAILED
    except KeyboardInterrupt:
        print("asr: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        sys.stderr.close()
        return OK
    except OSError as error:
        print(f"asr: {error}", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="asr", description="Speech to text on your own machine.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    transcribe = commands.add_parser("transcribe", help="transcribe files in this process, without a server")
    transcribe.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="may be a pipe; - is standard input"
    )
    transcribe.add_argument(
        "--format",
        choices=("text", "json", "srt", "vtt"),
        default="text",
        help="json of several files: a line for each, with file, and error where there is no transcript",
    )
    transcribe.add_argument(
        "--output", type=Path, metavar="DIR", help="write FILE.<format> there, not to stdout"
    )
    transcribe.add_argument("--model", default="", help="bundle to use (default: ASR_DEFAULT_MODEL)")
    transcribe.add_argument("--language", default=None, help="ISO-639-1 code")
    transcribe.add_argument(
        "--beam", type=int, help="width of the beam search, 0 is greedy (default: the model's own way)"
    )
    transcribe.add_argument("--hotword", action="append", default=[], metavar="WORD", help="may be repeated")
    transcribe.add_argument("--no-progress", action="store_true", help="no progress bar")
    transcribe.set_defaults(run=_transcribe)

    serve = commands.add_parser("serve", help="run the HTTP service (settings: ASR_*, see .env.example)")
    serve.add_argument("--host", default=None, help="overrides ASR_HOST")
    serve.add_argument("--port", type=int, default=None, help="overrides ASR_PORT; 0 takes a free one")
    serve.set_defaults(run=_serve)

    models = commands.add_parser("models", help="list, verify and pull bundles")
    actions = models.add_subparsers(required=True, metavar="ACTION")
    actions.add_parser("list", help="bundles here and in the catalogue").set_defaults(run=_models_list)
    verify = actions.add_parser("verify", help="check files, manifest and graph of bundles")
    verify.add_argument("names", nargs="*", metavar="NAME", help="default: all in ASR_MODELS_DIR")
    verify.set_defaults(run=_models_verify)
    pull = actions.add_parser("pull", help="download, convert and verify a model of the catalogue")
    pull.add_argument("name")
    pull.add_argument(
        "--calibration", type=Path, metavar="MANIFEST", help="recordings with texts: make an INT8 graph too"
    )
    pull.add_argument(
        "--validation",
        type=Path,
        metavar="MANIFEST",
        help="recordings with texts to accept INT8 on (default: those of --calibration)",
    )
    pull.add_argument(
        "--four-bits", action="store_true", help="with --calibration: weights of four bits in place of INT8"
    )
    pull.set_defaults(run=_models_pull)

    bench = commands.add_parser("bench", help="measure the engine on this machine")
    bench.add_argument("--model", default="", help="bundle to use (default: ASR_DEFAULT_MODEL)")
    bench.add_argument("--seconds", type=float, default=5.0, help="length of the clips")
    bench.add_argument("--clips", type=int, default=64, help="clips per measurement")
    bench.set_defaults(run=_bench)

    settings = commands.add_parser("settings", help="show the settings in force")
    settings.add_argument("--env-example", action="store_true", help="print .env.example instead")
    settings.set_defaults(run=_settings)
    return parser


def _for_model(name: str) -> Settings:
    """Settings that load one model only."""
    settings = load_settings()
    return load_settings(models=(name or settings.default_model_name,), default_model="")


def _transcribe(arguments: argparse.Namespace) -> int:
    settings = _for_model(arguments.model)
    from api.commands.transcribe import run

    return run(settings, arguments)


def _serve(arguments: argparse.Namespace) -> int:
    given = {
        name: getattr(arguments, name) for name in ("host", "port") if getattr(arguments, name) is not None
    }
    settings = load_settings(**given)  # before the imports: a wrong setting is said at once
    from api.commands.serve import run

    return run(settings)


def _models_list(_: argparse.Namespace) -> int:
    from api.commands.models import list_models

    return list_models(load_settings())


def _models_verify(arguments: argparse.Namespace) -> int:
    from api.commands.models import verify_models

    return verify_models(load_settings(), arguments.names)


def _models_pull(arguments: argparse.Namespace) -> int:
    from api.commands.models import pull_model

    return pull_model(
        load_settings(),
        arguments.name,
        arguments.calibration,
        arguments.validation,
        four_bits=arguments.four_bits,
    )


def _bench(arguments: argparse.Namespace) -> int:
    from api.commands.bench import run

    return run(_for_model(arguments.model), arguments.seconds, arguments.clips)


def _settings(arguments: argparse.Namespace) -> int:
    from api.env_example import env_example, in_force

    print(env_example() if arguments.env_example else in_force(load_settings()), end="")
    return OK


if __name__ == "__main__":
    sys.exit(main())
