//! What zypper's messages mean to whoever wrote the definition.

use oven_distro::Trouble;
use oven_rpm::trouble;

struct Row(&'static str, &'static str, Option<&'static str>, Option<&'static str>);

/// The definition is wrong, and which of its packages is not told.
const TOGETHER: Option<&str> = Some("");
const SEARCH: Option<&str> = Some(
    "Check its spelling, whether it is for this architecture, and which repositories the base image has.",
);
const FIT: Option<&str> =
    Some("The lines above say which of them do not fit together, or not with the base image.");
const KEY: Option<&str> = Some(
    "Check the `key` of the repository in image.toml, or `gpgkey` in its file in the base image. Packages are never \
     taken unchecked.",
);
const REACH: Option<&str> = Some("Is the address reachable? `[network]` of oven.toml holds the proxy.");

/// The most telling first.
const ROWS: &[Row] = &[
    Row(
        "*: Signature verification failed [6-File is unsigned]",
        "the package {1} is not signed",
        KEY,
        TOGETHER,
    ),
    Row(
        "*: Signature verification failed [4-Signatures public key is not available]",
        "the package {1} is signed by a key that the image does not trust",
        KEY,
        TOGETHER,
    ),
    Row(
        "*: Signature verification failed [*]",
        "the signature of the package {1} was not accepted: {2}",
        KEY,
        TOGETHER,
    ),
    Row(
        "File '*' from repository '*' is unsigned, continue?*",
        "the index of the repository `{2}` is not signed",
        KEY,
        None,
    ),
    Row("*Signature verification failed for *", "the signature of {2} was not accepted", KEY, None),
    Row(
        "File '*' from repository '*' is signed with an unknown key '*'.*",
        "the index of the repository `{2}` is signed by a key that the image does not trust",
        KEY,
        None,
    ),
    // A repository that is passed over lacks what it would have: that comes first.
    Row("*File '*' not found on medium '*'", "there is no {2} at {3}", REACH, None),
    Row("Download (curl) error for '*':", "{1} could not be downloaded", REACH, None),
    Row("Repository '*' is invalid.", "the index of the repository `{1}` cannot be had", REACH, None),
    Row(
        "*Problem retrieving files from '*'.",
        "the index of the repository `{2}` cannot be had",
        REACH,
        None,
    ),
    Row(
        "No provider of 'pattern:*' found.",
        "no repository of the image has the group `{1}`",
        SEARCH,
        Some("@{1}"),
    ),
    Row("No provider of '*' found.", "no repository of the image has the package `{1}`", SEARCH, Some("{1}")),
    Row("Package '*' not found.", "no repository of the image has the package `{1}`", SEARCH, Some("{1}")),
    Row("*nothing provides * needed by *", "nothing provides `{2}`, which {3} needs", FIT, TOGETHER),
    Row("*Problem: * conflicts with * provided by *", "{2} conflicts with {4}", FIT, TOGETHER),
    Row("*Problem: *", "the packages cannot be installed together: {2}", FIT, TOGETHER),
    Row(
        "*there are no enabled repositories defined*",
        "the image has no repository",
        Some("Name one in image.toml, or register the base image with its vendor."),
        None,
    ),
    Row(
        "*Run this command once more to install any other needed patches*",
        "zypper itself had to be upgraded before the rest",
        Some("Bake that as an image of its own, or say `upgrade = true`, which takes everything at once."),
        TOGETHER,
    ),
];

pub fn all() -> Vec<Trouble> {
    let rows = ROWS.iter().map(|Row(output, means, hint, package)| trouble(output, means, *hint, *package));
    oven_rpm::troubles().into_iter().chain(rows).collect()
}
