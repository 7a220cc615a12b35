//! Explains messages of dnf, yum and microdnf to the author of a definition.

use oven_distro::Trouble;
use oven_rpm::trouble;

struct Row(&'static str, &'static str, Option<&'static str>, Option<&'static str>);

/// Says that image.toml has to be changed, but that no single package is the cause.
const NO_SINGLE_PACKAGE: Option<&str> = Some("");
const SEARCH: Option<&str> = Some("Check its spelling, and which repositories the base image has.");
const INCOMPATIBLE: Option<&str> =
    Some("The lines above say which packages conflict with each other or with the base image.");
const KEY: Option<&str> = Some(
    "Check the `key` of the repository in image.toml, or `gpgkey` in its file in the base image. Packages are \
     always verified.",
);
const INCOMPLETE_ADDRESS: Option<&str> = Some(
    "Only a running instance can complete such an address. Set full addresses in the base image, or add a \
     [[repository]] to image.toml.",
);
const REACH: Option<&str> = Some("Is the address reachable? `[network]` of oven.toml sets proxy and mirror.");

/// The most specific rows come first.
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
        NO_SINGLE_PACKAGE,
    ),
    Row(
        "Cannot add package * to transaction. Not a compatible architecture: *",
        "`{1}` is for another architecture, {2}",
        SEARCH,
        NO_SINGLE_PACKAGE,
    ),
    Row(
        "*nothing provides * needed by *",
        "nothing provides `{2}`, which {3} needs",
        INCOMPATIBLE,
        NO_SINGLE_PACKAGE,
    ),
    Row(
        "*package * conflicts with * provided by *",
        "{2} conflicts with {4}",
        INCOMPATIBLE,
        NO_SINGLE_PACKAGE,
    ),
    Row("*package * obsoletes * provided by *", "{2} replaces {4}", INCOMPATIBLE, NO_SINGLE_PACKAGE),
    Row(
        "*cannot install both * and *",
        "{2} and {3} cannot be installed together",
        INCOMPATIBLE,
        NO_SINGLE_PACKAGE,
    ),
    Row("Error: Package: * (*)", "the package {1} cannot be installed", INCOMPATIBLE, NO_SINGLE_PACKAGE),
    Row(
        "*Public key for * is not installed*",
        "the package {2} is signed by a key that its repository does not name",
        KEY,
        NO_SINGLE_PACKAGE,
    ),
    Row(
        "*Package * is not signed*",
        "the package {2} is not signed, and its repository says that it is",
        KEY,
        NO_SINGLE_PACKAGE,
    ),
    Row(
        "*OpenPGP check for package \"*\" (*) from repo \"*\" has failed: *",
        "the signature of the package {2} was not accepted: {5}",
        KEY,
        NO_SINGLE_PACKAGE,
    ),
    Row(
        "*keys listed for the \"*\" repository are already installed but they are not correct for this package*",
        "a package of the repository `{2}` is signed by a key that the repository does not name",
        KEY,
        NO_SINGLE_PACKAGE,
    ),
    Row("*GPG check FAILED*", "a package is not signed by a key of its repository", KEY, NO_SINGLE_PACKAGE),
    Row(
        "*://*$*region*",
        "the address of a repository has a part that only a running instance fills in: ://{2}${3}region{4}",
        INCOMPLETE_ADDRESS,
        None,
    ),
    Row(
        "*://*REGION*",
        "the address of a repository has a part that only a running instance fills in: ://{2}REGION{3}",
        INCOMPLETE_ADDRESS,
        None,
    ),
    Row(
        "*Could not resolve host: *.default.*",
        "the address of a repository is incomplete: {2}.default.{3}",
        INCOMPLETE_ADDRESS,
        None,
    ),
    Row("*Status code: * for * (IP*", "the mirror answered {2} for {3}", REACH, None),
    Row("*HTTP Error * - *", "the mirror answered {2} ({3})", REACH, None),
    Row("*Curl error (*): * for * [*]", "{4} could not be downloaded: {5}", REACH, None),
    Row(
        "Error: There are no enabled repositories in *",
        "the image has no repository",
        Some("Add one to image.toml, or register the base image with its vendor."),
        None,
    ),
    Row(
        "There are no enabled repos.",
        "the image has no repository",
        Some("Add one to image.toml, or register the base image with its vendor."),
        None,
    ),
    Row(
        "Error: Failed to download metadata for repo '*': *",
        "the index of the repository `{1}` could not be downloaded: {2}",
        REACH,
        None,
    ),
    Row("Error: Error downloading packages:", "packages could not be downloaded", REACH, None),
    Row(
        "Error: Some packages have invalid cache, but cannot be downloaded due to \"--cacheonly\" option",
        "the packages to install are not the ones that were downloaded",
        Some(
            "The upgrade before it may have changed the dependencies: bake the upgrade as an image of its own.",
        ),
        None,
    ),
];

pub fn troubles() -> Vec<Trouble> {
    let rows = ROWS.iter().map(|Row(output, means, hint, package)| trouble(output, means, *hint, *package));
    oven_rpm::troubles().into_iter().chain(rows).collect()
}

/// Messages that mean a failure although the exit status is 0.
pub fn failures() -> Vec<Trouble> {
    let mut failures = oven_rpm::failures();
    // yum continues if it does not find a package. dnf also continues if the image's settings allow it.
    let missing = ROWS.iter().filter(|row| row.0.starts_with("No ") || row.0.starts_with("Warning: Group"));
    failures.extend(missing.map(|Row(output, means, hint, package)| trouble(output, means, *hint, *package)));
    failures.push(trouble(
        "*Non-critical error in * scriptlet: *",
        "a {2} script of the package {3} failed",
        Some("The lines above show its output."),
        None,
    ));
    failures
}

pub fn notes() -> Vec<Trouble> {
    let key = "the image now trusts the OpenPGP key 0x{2}";
    let mut notes = oven_rpm::notes();
    notes.push(trouble("*Importing GPG key 0x*:", key, None, None));
    notes.push(trouble("*Importing OpenPGP key 0x*:", key, None, None));
    notes
}
