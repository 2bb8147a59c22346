"""``fsllm login``."""

from pathlib import Path

import click

from fsllm_common.identity.join import read_join_file
from fsllm_operator.credentials import login_folder
from fsllm_operator.login import enroll


@click.command(
    epilog="""
\b
On the server's host:  fsllm operator invite alice -o alice.join
Here:                  fsllm login --join alice.join
                       fsllm doctor
"""
)
@click.option(
    "--join",
    "join_file",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The join file, made by `fsllm operator invite`. It works once.",
)
@click.option("--host", help="The server's host name, when it is not the one in the join file.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to keep the credential; name it with --credential later. Default: ~/.config/fsllm/operator.",
)
def login(join_file: Path, host: str | None, folder: Path | None) -> None:
    """Make this host an operator's.

    The private key is made here and never leaves. The certificate is renewed whenever fsllm is used after two thirds of
    its life; when it has expired, another operator must invite you again.
    """
    folder = folder or login_folder()
    join = read_join_file(join_file)
    credential = enroll(join, folder, host)
    until = credential.certificate.not_after
    click.echo(
        f"You are operator {join.name} of {join.federation}, until {until:%Y-%m-%d %H:%M} UTC and renewed on use."
    )
    click.echo(f"The credential lies in {folder}. The join file is spent: delete it.")
