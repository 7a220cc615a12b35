//! What the messages of dnf, yum and microdnf mean to whoever wrote the definition.

use oven_distro::Trouble;
use oven_rpm::trouble;

struct Row(&'static str, &'static str, Option<&'static str>, Option<&'static str>);

/// The definition is wrong, and which of its packages is not told.
const TOGETHER: Option<&str> = Some("");
const SEARCH: Option<&str> = Some("Check its spelling, and which repositories the base image has.");
const FIT: Option<&str> =
    Some("The lines above say which of them do not fit together, or not with the base image.");
const KEY: Option<&str> = Some(
    "Check the `key` of the repository in image.toml, or `gpgkey` in its file in the base image. Packages are never \
     taken unchecked.",
);
const PLACE: Option<&str> = Some(
    "Such an address is completed on a running instance. Give its repositories a full address in the base image, or \
     name one in image.toml.",
);
const REACH: Option<&str> =
    Some("Is the address reachable? `[network]` of oven.toml holds proxy and mirror.");

/// The most telling first.
const ROWS: &[Row] = &[
    Row("No match for argument: *", "no repository of the image has the package `{1}`", SEARCH, Some("{1}")),
    Row(
        "Module or Group '*' is not available.",
        "no repository of the image has the group `{1}`",
        SEARCH,
        Some("@{1}"),
    ),
    Row("No package * available.", "no repository of the image has the package `{1}`", SEARCH, Some("{1}")),
    Row(
        "Warning: Group * does not exist.",
        "no repository of the image has the group `{1}`",
        SEARCH,
        Some("@{1}"),
    ),
    Row(
        "error: No package matches '*'",
        "no repository of the image has the package `{1}`",
        SEARCH,
        Some("{1}"),
    ),
    Row(
        "*package * does not have a compatible architecture",
        "`{2}` is for another architecture",
        SEARCH,
        TOGETHER,
    ),
    Row(
        "Cannot add package * to transaction. Not a compatible architecture: *",
        "`{1}` is for another architecture, {2}",
        SEARCH,
        TOGETHER,
    ),
    Row("*nothing provides * needed by *", "nothing provides `{2}`, which {3} needs", FIT, TOGETHER),
    Row("*package * conflicts with * provided by *", "{2} conflicts with {4}", FIT, TOGETHER),
    Row("*package * obsoletes * provided by *", "{2} replaces {4}", FIT, TOGETHER),
    Row("*cannot install both * and *", "{2} and {3} cannot be installed together", FIT, TOGETHER),
    Row("Error: Package: * (*)", "the package {1} cannot be installed", FIT, TOGETHER),
    Row(
        "*Public key for * is not installed*",
        "the package {2} is signed by a key that its repository does not name",
        KEY,
        TOGETHER,
    ),
    Row(
        "*Package * is not signed*",
        "the package {2} is not signed, and its repository says that it is",
        KEY,
        TOGETHER,
    ),
    Row(
        "*OpenPGP check for package \"*\" (*) from repo \"*\" has failed: *",
        "the signature of the package {2} was not accepted: {5}",
        KEY,
        TOGETHER,
    ),
    Row(
        "*keys listed for the \"*\" repository are already installed but they are not correct for this package*",
        "a package of the repository `{2}` is signed by a key that it does not name",
        KEY,
        TOGETHER,
    ),
    Row("*GPG check FAILED*", "a package is not signed by a key of its repository", KEY, TOGETHER),
    Row(
        "*://*$*region*",
        "the address of a repository has a part that only an instance fills in: ://{2}${3}region{4}",
        PLACE,
        None,
    ),
    Row(
        "*://*REGION*",
        "the address of a repository has a part that only an instance fills in: ://{2}REGION{3}",
        PLACE,
        None,
    ),
    Row(
        "*Could not resolve host: *.default.*",
        "the address of a repository was never completed: {2}.default.{3}",
        PLACE,
        None,
    ),
    Row("*Status code: * for * (IP*", "the mirror answered {2} for {3}", REACH, None),
    Row("*HTTP Error * - *", "the mirror answered {2} ({3})", REACH, None),
    Row("*Curl error (*): * for * [*]", "{4} could not be downloaded: {5}", REACH, None),
    Row(
        "Error: There are no enabled repositories in *",
        "the image has no repository",
        Some("Name one in image.toml, or register the base image with its vendor."),
        None,
    ),
    Row(
        "There are no enabled repos.",
        "the image has no repository",
        Some("Name one in image.toml, or register the base image with its vendor."),
        None,
    ),
    Row(
        "Error: Failed to download metadata for repo '*': *",
        "the index of the repository `{1}` cannot be had: {2}",
        REACH,
        None,
    ),
    Row("Error: Error downloading packages:", "packages could not be downloaded", REACH, None),
    Row(
        "Error: Some packages have invalid cache, but cannot be downloaded due to \"--cacheonly\" option",
        "what is to be installed is not what was downloaded",
        Some(
            "An upgrade before it may have changed what is needed: bake the upgrade as an image of its own.",
        ),
        None,
    ),
];

pub fn all() -> Vec<Trouble> {
    let rows = ROWS.iter().map(|Row(output, means, hint, package)| trouble(output, means, *hint, *package));
    oven_rpm::troubles().into_iter().chain(rows).collect()
}

/// What ends with 0 all the same.
pub fn failures() -> Vec<Trouble> {
    let mut failures = oven_rpm::failures();
    // yum goes on without what it does not find, and dnf where the image's settings say so.
    let missing = ROWS.iter().filter(|row| row.0.starts_with("No ") || row.0.starts_with("Warning: Group"));
    failures.extend(missing.map(|Row(output, means, hint, package)| trouble(output, means, *hint, *package)));
    failures.push(trouble(
        "*Non-critical error in * scriptlet: *",
        "a {2} script of the package {3} failed",
        Some("The lines above say what it said."),
        None,
    ));
    failures
}

pub fn notes() -> Vec<Trouble> {
    let key = "an OpenPGP key is trusted by the image from now on: 0x{2}";
    let mut notes = oven_rpm::notes();
    notes.push(trouble("*Importing GPG key 0x*:", key, None, None));
    notes.push(trouble("*Importing OpenPGP key 0x*:", key, None, None));
    notes
}
