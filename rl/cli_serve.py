"""`lockstep serve`: a policy behind an OpenAI-compatible endpoint."""

from typing import Annotated

import typer

from rl.cli_support import PolicyArgument, clear_errors, console


def serve(
    policy: PolicyArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; other than loopback only with a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the policy [default: the folder's name].")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="LOCKSTEP_API_KEY", help="Bearer token that clients must send.")
    ] = None,
    max_open: Annotated[int, typer.Option(min=1, help="Requests open at once; a further one gets status 429.")] = 256,
    max_batch: Annotated[int, typer.Option(min=1, help="Most sequences decoded at once; changes no answer.")] = 64,
    memory_mb: Annotated[int, typer.Option(min=1, help="MiB for the engine's cache; changes no answer.")] = 512,
    speculative_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens guessed ahead from the text so far; changes no answer.")
    ] = 0,
) -> None:
    """Serves a policy to OpenAI clients: completions, chat, streams, log-probs."""
    with clear_errors("start it again"):
        try:
            from rl.serve.run import ServeSettings
            from rl.serve.run import serve as run_server
        except ModuleNotFoundError as error:
            raise ValueError(f"{error}; run `pip install 'lockstep-rl[serve]'`") from None
        settings = ServeSettings(policy, host, port, name, api_key, max_open, max_batch, memory_mb, speculative_tokens)
        run_server(settings, console)
