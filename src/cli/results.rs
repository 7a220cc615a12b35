//! The table of the verbs' results in the `--json` stream. The reference page and the schema are generated from it.
//! Each result is built in the file of its verb.

use crate::report::events::JsonType::{Anything, Boolean, Either, Integer, List, Map, Object, Text, Words};
use crate::report::events::{ERROR, EventField, EventSpec, JsonType, KINDS, TEXT_OR_NULL, always, sometimes};

/// Fields of each result, in addition to the fields of every event.
pub static COMMON: &[EventField] = &[
    always("exit_code", Integer, "The exit code of oven."),
    sometimes(
        "error",
        Object(ERROR),
        "Why the verb failed: the first of `errors`. If this field is present, the fields of the verb are missing. If \
         only single images of a bake failed, their errors are in `images`.",
    ),
    sometimes(
        "errors",
        List(&Object(ERROR)),
        "The mistakes because of which the verb failed: of each file, at most the first 20.",
    ),
    sometimes(
        "more_errors",
        Integer,
        "The number of further mistakes. It is missing if `errors` has all of them.",
    ),
];

const TEXTS: JsonType = List(&Text);
const IMAGE: &[EventField] = &[
    always("id", Text, "The AMI's id."),
    always("name", Text, "The AMI's name."),
    always(
        "state",
        Words(&["pending", "available", "failed"]),
        "The state. Only an `available` image can be used.",
    ),
    always("architecture", Words(&["x86_64", "arm64"]), "The architecture."),
    always("snapshot", Text, "The id of its root snapshot."),
    always("size_gib", Integer, "The size of its root volume in GiB."),
    always("created", Text, "When it was created, as RFC 3339 in UTC."),
    always("description", Text, "Its description."),
    always("tags", Map(&Text), "Its tags."),
];
const STEP: &[EventField] = &[
    always("phase", Text, "The phase, as in the event `step`."),
    always("what", Text, "What the step does, as in the event `step`."),
    always(
        "skipped_if",
        TEXT_OR_NULL,
        "The condition under which the bake skips the step; null if there is none.",
    ),
];
const STALE_RUN: &[EventField] = &[
    always("run", Text, "The id of the run."),
    always("owner", Text, "The host and the process that it belonged to."),
    always("resources", TEXTS, "The ids of its leftovers: volumes, snapshots, directories."),
    always("kept", Boolean, "Whether `--keep-on-failure` preserved its disk."),
];

/// The result of each verb. If a verb fails as a whole, its result has only the fields of [`COMMON`].
pub static RESULTS: &[EventSpec] = &[
    EventSpec {
        name: "oven bake",
        doc: "An object for each image, parents first.",
        fields: &[always(
            "images",
            List(&Object(&[
                always("name", Text, "The definition's name."),
                always("definition", Text, "The definition's directory."),
                always(
                    "asked",
                    Boolean,
                    "Whether the definition was named on the command line. False if it was baked only as a parent.",
                ),
                always(
                    "outcome",
                    Words(&["baked", "already-baked", "skipped", "failed"]),
                    "The outcome. `skipped`: not baked, because the parent has no image.",
                ),
                always("run", TEXT_OR_NULL, "The id of the run; null if nothing was done."),
                always("log", TEXT_OR_NULL, "The log file; null if nothing was done."),
                always("kept", TEXTS, "The disks that `--keep-on-failure` preserved."),
                always(
                    "left_behind",
                    List(&Object(&[
                        always("what", Text, "What could not be removed."),
                        always("why", Text, "Why it could not be removed."),
                        always("command", Text, "The command that removes it."),
                    ])),
                    "Leftovers that the clean-up could not remove.",
                ),
                sometimes("ami_id", Text, "The AMI's id, if there is an image."),
                sometimes("ami_name", Text, "The AMI's name."),
                sometimes("snapshot_id", Text, "The id of its root snapshot."),
                sometimes("kind", KINDS, "The kind of failure, if it failed."),
                sometimes("error", Text, "What failed, and why."),
                sometimes("hint", TEXT_OR_NULL, "What the user can do about it."),
                sometimes("errors", List(&Object(ERROR)), "The mistakes because of which it failed."),
                sometimes(
                    "more_errors",
                    Integer,
                    "The number of further mistakes, if `errors` does not have all of them.",
                ),
            ])),
            "The images.",
        )],
    },
    EventSpec {
        name: "oven plan",
        doc: "What a bake would do with each image, parents first.",
        fields: &[always(
            "images",
            List(&Object(&[
                always("name", Text, "The definition's name."),
                always("definition", Text, "The definition's directory."),
                always("hit", Boolean, "Whether the image exists already."),
                always("ami_id", TEXT_OR_NULL, "The AMI's id, if it exists."),
                always("why", TEXTS, "Why it would be baked."),
                always(
                    "last_ms",
                    JsonType::OrNull(&Integer),
                    "How many milliseconds the bake of the newest image took; null if the image exists already, or if \
                     this machine does not know it.",
                ),
                sometimes(
                    "steps",
                    JsonType::OrNull(&List(&Object(STEP))),
                    "With `--steps`: the steps that a bake would run, in order. Null if the image exists already, or if \
                     its parent has to be baked first. The phase `cache` and steps that depend on what earlier steps change \
                     are not listed.",
                ),
                always("vars", Map(&Text), "Its variables."),
                always(
                    "secrets",
                    Map(&Boolean),
                    "The names of its secrets, and whether each is set in the environment.",
                ),
                always(
                    "permitted_secrets",
                    TEXTS,
                    "Those of its secrets that a bake with the same flags would pass to its scripts.",
                ),
            ])),
            "The images.",
        )],
    },
    EventSpec {
        name: "oven validate",
        doc: "The valid definitions, parents first. If one has a mistake, the result has only `errors`.",
        fields: &[always(
            "images",
            List(&Object(&[
                always("name", Text, "The definition's name."),
                always("definition", Text, "The definition's directory."),
                always("asked", Boolean, "Whether the definition was named on the command line."),
            ])),
            "The definitions.",
        )],
    },
    EventSpec {
        name: "oven plan --os-release",
        doc: "The plan of the distro plugin.",
        fields: &[
            always("plugin", Text, "The plugin's name."),
            sometimes("plan", Anything, "The plan: `plan` of plugins/api/schema/plan.answer.json."),
            sometimes(
                "request",
                Anything,
                "With `--request`, the request to the plugin: plugins/api/schema/plan.request.json.",
            ),
        ],
    },
    EventSpec {
        name: "oven plugin list",
        doc: "The distro plugins.",
        fields: &[
            always(
                "plugins",
                List(&Object(&[
                    always("id", Text, "The plugin's name."),
                    always("origin", Text, "The origin of the plugin."),
                    always("sha256", TEXT_OR_NULL, "The digest of its executable; null if it is built in."),
                    sometimes(
                        "claims",
                        Map(&TEXTS),
                        "Widely known systems that it claims, as `exact` or as `family`.",
                    ),
                    sometimes("error", Text, "Why the plugin failed."),
                ])),
                "The plugins that are used.",
            ),
            always(
                "passed_over",
                List(&Object(&[
                    always("path", Text, "The file."),
                    always("why", Text, "Why it is not used."),
                ])),
                "Files in the plugin directories that are not used.",
            ),
        ],
    },
    EventSpec {
        name: "oven plugin check",
        doc: "The findings of the conformance suite.",
        fields: &[
            always("plugin", Text, "The plugin, as it was named on the command line."),
            always("conforms", Boolean, "Whether the plugin has no faults."),
            always(
                "rules",
                List(&Object(&[
                    always("rule", Text, "The rule."),
                    always("tried", Boolean, "Whether the rule could be tested."),
                    always("faults", TEXTS, "The faults that violate the rule."),
                ])),
                "The rules.",
            ),
        ],
    },
    EventSpec {
        name: "oven plugin new",
        doc: "The new files.",
        fields: &[always("files", TEXTS, "The paths of the new files. The first is the plugin.")],
    },
    EventSpec {
        name: "oven checksum",
        doc: "The checksum of a definition's files.",
        fields: &[
            always("ami_config_checksum", Text, "The checksum, a SHA-1 in hexadecimal."),
            always(
                "files",
                List(&Object(&[
                    always("path", Text, "The file's path."),
                    always("sha1", Text, "The SHA-1 of the file."),
                ])),
                "The files that the checksum covers, in the order in which it covers them.",
            ),
        ],
    },
    EventSpec {
        name: "oven images list",
        doc: "The images, oldest first.",
        fields: &[always("images", List(&Object(IMAGE)), "The images.")],
    },
    EventSpec {
        name: "oven images show",
        doc: "One image: the fields of an image of `oven images list`, and its documents.",
        fields: &[
            always("id", Text, "The AMI's id."),
            always("name", Text, "The AMI's name."),
            always(
                "state",
                Words(&["pending", "available", "failed"]),
                "The state. Only an `available` image can be used.",
            ),
            always("architecture", Words(&["x86_64", "arm64"]), "The architecture."),
            always("snapshot", Text, "The id of its root snapshot."),
            always("size_gib", Integer, "The size of its root volume in GiB."),
            always("created", Text, "When it was created, as RFC 3339 in UTC."),
            always("description", Text, "Its description."),
            always("tags", Map(&Text), "Its tags."),
            always(
                "documents",
                Map(&Text),
                "Texts that the bake stored with the image, such as the list of its packages.",
            ),
        ],
    },
    EventSpec {
        name: "oven images remove",
        doc: "The images that were removed.",
        fields: &[always("removed", List(&Object(IMAGE)), "The images, as in `oven images list`.")],
    },
    EventSpec {
        name: "oven import",
        doc: "The base image, which may have existed already.",
        fields: &[
            always("ami_id", Text, "The AMI's id."),
            always("ami_name", Text, "The AMI's name."),
            always("snapshot_id", Text, "The id of its root snapshot."),
        ],
    },
    EventSpec {
        name: "oven export",
        doc: "The raw disk image that was written.",
        fields: &[
            always("snapshot_id", Text, "The id of the snapshot."),
            always("file", Text, "The file's path."),
            always("size_gib", Integer, "The size of the disk in GiB."),
            always("blocks", Integer, "The number of blocks of 512 KiB in the snapshot."),
            always(
                "bytes_on_disk",
                Integer,
                "The disk space that the file uses. The holes of a sparse file use none.",
            ),
        ],
    },
    EventSpec { name: "oven shell", doc: "Only the exit code, which is that of the shell.", fields: &[] },
    EventSpec {
        name: "oven sweep",
        doc: "The leftovers that were removed, or with `--dry-run` would be removed.",
        fields: &[
            always("dry_run", Boolean, "Whether the leftovers were only listed."),
            always(
                "swept",
                List(&Object(STALE_RUN)),
                "Runs whose leftovers were removed, or with `--dry-run` would be removed.",
            ),
            always(
                "caches",
                List(&Text),
                "Directories of the package cache that killed bakes left, and that were removed, or with `--dry-run` would \
                 be removed.",
            ),
            always(
                "failed",
                Integer,
                "The number of runs and of directories of the package cache that could not be removed.",
            ),
            always(
                "kept",
                List(&Object(STALE_RUN)),
                "Runs whose disks were not removed, because `--kept` was not given.",
            ),
        ],
    },
    EventSpec {
        name: "oven doctor",
        doc: "The checks of this machine.",
        fields: &[
            always("fit", Boolean, "Whether this machine can bake."),
            always(
                "checks",
                List(&Object(&[
                    always("what", Text, "What was checked."),
                    always(
                        "verdict",
                        Words(&["ok", "note", "lacks"]),
                        "`ok`: nothing is missing. `note`: something is missing or unusual, but a bake works. `lacks`: \
                         something that a bake needs is missing.",
                    ),
                    sometimes("note", Text, "With `note`: what is missing or unusual."),
                    sometimes("why", Text, "With `lacks`: what is missing."),
                    sometimes("fix", Text, "With `lacks`: what to do about it."),
                ])),
                "The checks.",
            ),
            sometimes(
                "permissions",
                List(&Object(&[
                    always("action", Text, "The action, such as `ec2:CreateVolume`."),
                    always(
                        "verdict",
                        Either(&[
                            Words(&["granted", "missing"]),
                            Object(&[always("unknown", Text, "Why oven could not find it out.")]),
                        ]),
                        "Whether the role has this permission.",
                    ),
                ])),
                "In AWS: the permissions of the role.",
            ),
        ],
    },
    EventSpec {
        name: "oven policy",
        doc: "The IAM policy.",
        fields: &[always("policy", Anything, "The policy document.")],
    },
    EventSpec {
        name: "oven completions",
        doc: "The completions of a shell.",
        fields: &[always("script", Text, "The script to load.")],
    },
];
