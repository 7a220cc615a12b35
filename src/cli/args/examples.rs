//! The examples and remarks at the end of the help texts.

pub const EXIT_CODES: &str = "Exit codes:
    0  success: the image is baked, or was already baked
    2  the command line is wrong
    3  a definition or a setting is wrong
    4  a base image, an image or a run was not found
    5  a step in the image failed
    6  the cloud refused a request or failed
    7  the image is baked, but some leftovers could not be removed
    8  this machine lacks something; `oven doctor` lists what is missing
  130  interrupted";

pub const BAKE: &str = "Examples:
  oven bake web                     print the AMI's id on standard output
  oven bake base web db -j 3        bake parents first, others concurrently
  oven bake --keep-on-failure web   then: oven shell RUN, oven sweep --kept";
pub const PLAN: &str = "Examples:
  oven plan web                                    already baked? if not, why?
  oven plan --steps web                            the steps that a bake runs
  oven plan --os-release debian.txt web            the steps for that system
  oven plan --os-release void.txt --plugin void.py web";
pub const VALIDATE: &str = "Examples:
  oven validate web db              check two definitions and their parents
  oven --json validate web          a JSON object for each mistake

Not checked: whether the base image and the packages exist. `oven plan` looks
for the base image, and a bake finds the rest.";
pub const CHECK: &str = "A golden plan is a pair of files in NAME.golden: CASE.request.json, which\n\
        `oven plan --request` prints, and CASE.answer.json, which --bless writes.";
pub const NEW: &str = "Examples:
  oven plugin new void              write void.py and void.golden/
  oven plugin new void --lang sh    write void.sh, which needs jq";
pub const IMPORT: &str = "Examples:
  oven import debian-12.raw --name debian-12-base
  xz -dc debian-12.raw.xz | oven import - --name debian-12-base

A pipe is first copied to a file without a name in $TMPDIR, or in /var/tmp.
The script scripts/make-base in oven's sources makes a Debian image:
scripts/make-base debian-12.raw. If your image has another format, convert it
first: qemu-img convert -O raw debian-12.qcow2 debian-12.raw";
pub const EXPORT: &str = "Examples:
  oven export ami-0123456789abcdef0 disk.raw
  qemu-img convert -O qcow2 disk.raw disk.qcow2
  oven export ami-0123456789abcdef0 - | zstd > disk.raw.zst

oven verifies every block. The file is sparse. It appears only when complete. A
pipe gets all zeros, and may get a part of the disk before an error is found.";
pub const SHELL: &str = "Examples:
  oven shell ami-0123456789abcdef0
  oven shell --network 1f2e3d4c -- apt-get update
  oven shell --rerun 1f2e3d4c

A shell on the disk of a run has the files, variables, environment and secrets
of the step that failed. The values of secrets are not stored: set them in
oven's environment.

The exit code is that of the shell. Changes to an image are discarded. Changes
to the disk of a run are preserved until `oven sweep --kept` removes the disk.";
pub const SWEEP: &str = "oven never removes resources of a run that is known to be active. Disks that\n\
        --keep-on-failure preserved are removed only with --kept. Without --run, the downloads\n\
        that killed bakes left in this machine's package cache are removed, too.";
pub const POLICY: &str = "Examples:
  oven policy > oven.json
  aws iam put-role-policy --role-name builder --policy-name oven \\
      --policy-document file://oven.json

The policy permits oven to create only resources with oven's tag, and to change
or remove only those. Without --disks, the policy covers bakes with both kinds
of disks. With --disks, it covers only bakes with that kind of disks. The
command needs neither credentials nor a network.";
pub const COMPLETIONS: &str = "Examples:
  oven completions bash > /etc/bash_completion.d/oven
  oven completions zsh > /usr/local/share/zsh/site-functions/_oven
  oven completions fish > ~/.config/fish/completions/oven.fish";
