"""`mpqc sign`: an artifact or a pipeline signed, and keys to do it with."""

from __future__ import annotations

import argparse
from pathlib import Path

from mpq_compiler.cli import output
from mpq_compiler.cli.options import Commands
from mpq_compiler.support import terminal
from mpq_compiler.support.errors import UserError


def add(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add("sign", run, "sign an artifact or a whole pipeline, or make a key to sign with")
    parser.add_argument("artifact", metavar="ARTIFACT", nargs="?")
    parser.add_argument("--key", metavar="PRIVATE", help="the private key, PEM (of --new-key, or of openssl: Ed25519)")
    parser.add_argument(
        "--new-key", metavar="PRIVATE", help="make a key: this file for you alone, and one with .pub.pem for everyone"
    )
    parser.add_argument("--passphrase-file", metavar="FILE", help="its first line encrypts the private key")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Sign, or make a key; return the public key in hexadecimal, and what was written."""
    from mpq_compiler.artifact import signing

    if args.new_key is not None:
        if args.artifact is not None or args.key is not None:
            raise UserError("--new-key makes a key and signs nothing: leave ARTIFACT and --key out")
        output.require_new(args.new_key, overwrite=False)
        passphrase = None if args.passphrase_file is None else signing.passphrase_of(args.passphrase_file)
        public, key = signing.new_key(args.new_key, passphrase)
        terminal.say(f"wrote {args.new_key}, for yourself alone, and {public}, for whoever checks\nkey {key}")
        return {"private": args.new_key, "public": str(public), "key": key}
    if args.artifact is None or args.key is None:
        raise UserError("name what is signed and the private key: mpqc sign ARTIFACT --key PRIVATE.pem")
    passphrase = None if args.passphrase_file is None else signing.passphrase_of(args.passphrase_file)
    key, signed = signing.sign(Path(args.artifact), signing.private_key(args.key, passphrase))
    terminal.say(f"signed {args.artifact}: {len(signed.files)} files\nkey {key}")
    return {"artifact": args.artifact, "files": len(signed.files), "key": key}
