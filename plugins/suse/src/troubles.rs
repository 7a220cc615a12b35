//! Explains zypper's messages to the author of a definition.

use oven_distro::Trouble;
use oven_rpm::trouble;

struct Row(&'static str, &'static str, Option<&'static str>, Option<&'static str>);

/// Says that image.toml has to be changed, but that no single package is the cause.
const NO_SINGLE_PACKAGE: Option<&str> = Some("");
const SEARCH: Option<&str> = Some(
    "Check its spelling, whether it is for this architecture, and which repositories the base image has.",
);
const INCOMPATIBLE: Option<&str> =
    Some("The lines above say which packages conflict with each other or with the base image.");
const KEY: Option<&str> = Some(
    "Check the `key` of the repository in image.toml, or `gpgkey` in its file in the base image. Packages are \
     always verified.",
);
const REACH: Option<&str> = Some("Is the address reachable? `[network]` of oven.toml sets the proxy.");

/// The most specific rows come first.
const ROWS: &[Row] = &[
    Row(
        "*: Signature verification failed [6-File is unsigned]",
        "the package {1} is not signed",
        KEY,
        NO_SINGLE_PACKAGE,
    ),
    Row(
        "*: Signature verification failed [4-Signatures public key is not available]",
        "the package {1} is signed by a key that the image does not trust",
        KEY,
        NO_SINGLE_PACKAGE,
    ),
    Row(
        "*: Signature verification failed [*]",
        "the signature of the package {1} was not accepted: {2}",
        KEY,
        NO_SINGLE_PACKAGE,
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
    // These rows come before the rows for missing packages: if zypper skips a repository, it also reports the
    // repository's packages as missing.
    Row("*File '*' not found on medium '*'", "there is no {2} at {3}", REACH, None),
    Row("Download (curl) error for '*':", "{1} could not be downloaded", REACH, None),
    Row(
        "Repository '*' is invalid.",
        "the index of the repository `{1}` could not be downloaded",
        REACH,
        None,
    ),
    Row(
        "*Problem retrieving files from '*'.",
        "the index of the repository `{2}` could not be downloaded",
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
    Row(
        "*nothing provides * needed by *",
        "nothing provides `{2}`, which {3} needs",
        INCOMPATIBLE,
        NO_SINGLE_PACKAGE,
    ),
    Row(
        "*Problem: * conflicts with * provided by *",
        "{2} conflicts with {4}",
        INCOMPATIBLE,
        NO_SINGLE_PACKAGE,
    ),
    Row("*Problem: *", "the packages cannot be installed together: {2}", INCOMPATIBLE, NO_SINGLE_PACKAGE),
    Row(
        "*there are no enabled repositories defined*",
        "the image has no repository",
        Some("Add one to image.toml, or register the base image with its vendor."),
        None,
    ),
    Row(
        "*Run this command once more to install any other needed patches*",
        "zypper had to upgrade itself before the other packages",
        Some(
            "Bake the upgrade of zypper as an image of its own, or set `upgrade = true`, which upgrades everything at once.",
        ),
        NO_SINGLE_PACKAGE,
    ),
];

pub fn troubles() -> Vec<Trouble> {
    let rows = ROWS.iter().map(|Row(output, means, hint, package)| trouble(output, means, *hint, *package));
    oven_rpm::troubles().into_iter().chain(rows).collect()
}
