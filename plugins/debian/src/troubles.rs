//! What apt's and dpkg's messages mean to whoever wrote the definition.

use oven_distro::Trouble;

struct Row(&'static str, &'static str, Option<&'static str>, Option<&'static str>);

/// The definition is wrong, and which of its packages is not told.
const TOGETHER: Option<&str> = Some("");
const SEARCH: Option<&str> = Some("Check its spelling, and which repositories the base image has.");
const FIT: Option<&str> =
    Some("The lines above say which of them do not fit together, or not with the base image.");
const KEY: &str =
    "Check `key` of its [[repository]] in image.toml, if it has one there: repositories change their keys.";
const SCRIPT: Option<&str> = Some(
    "A script of the package failed. While it runs, no service can be started and there is no network (unless \
     image.toml says `network = true`).",
);

/// The most telling first: a package that does not fit makes apt print general words, too.
const ROWS: &[Row] = &[
    Row(
        "E: Unable to locate package *",
        "no repository of the image has the package `{1}`",
        SEARCH,
        Some("{1}"),
    ),
    Row(
        "E: Couldn't find any package by * '*'",
        "no repository of the image has the package `{2}`",
        SEARCH,
        Some("{2}"),
    ),
    Row(
        "E: Version '*' for '*' was not found",
        "no repository of the image has version `{1}` of `{2}`",
        Some("`*` stands for anything; an epoch, such as the `5:` of `5:7.0.*`, is part of a version."),
        Some("{2}"),
    ),
    Row(
        "E: Package '*' has no installation candidate",
        "`{1}` cannot be installed: it is virtual, or no longer in a repository",
        Some("If it is virtual, name one of the packages that provide it; the lines above list them."),
        Some("{1}"),
    ),
    Row("dpkg: error processing package * (*):", "the package `{1}` could not be configured", SCRIPT, None),
    Row("dpkg: error processing archive * (*):", "the package file {1} could not be unpacked", None, None),
    Row(
        "E: Unable to correct problems, you have held broken packages.",
        "the packages cannot be installed together",
        FIT,
        TOGETHER,
    ),
    Row("E: Unmet dependencies.*", "the packages cannot be installed together", FIT, TOGETHER),
    Row("E: Essential packages were removed*", "the packages would remove an essential one", FIT, TOGETHER),
    Row(
        "E: Held packages were changed*",
        "a package that the base image holds would be changed",
        Some("Release it in the base image (`apt-mark unhold`), or leave it out."),
        TOGETHER,
    ),
    Row(
        "E: You don't have enough free space in *.",
        "there is no space left in {1} for what is to be downloaded",
        Some(
            "It is kept on this machine: make room there. Where it is not, give the image a larger disk: `size_gib` of \
             `[disk]` in image.toml.",
        ),
        None,
    ),
    Row(
        "*GPG error: *: *NO_PUBKEY *",
        "the repository {2} is signed by another key than the one it should be signed by: {4}",
        Some(KEY),
        None,
    ),
    Row("*GPG error: *: *EXPKEYSIG *", "the key of the repository {2} has expired: {4}", Some(KEY), None),
    Row("*GPG error: *: *REVKEYSIG *", "the key of the repository {2} was revoked: {4}", Some(KEY), None),
    Row(
        "*GPG error: *: *BADSIG *",
        "the signature of the repository {2} is wrong, by {4}",
        Some(
            "What came is not what was signed: is there a proxy or mirror that changes it, or is half of it new?",
        ),
        None,
    ),
    Row("*GPG error: *: *", "the signature of the repository {2} cannot be verified: {3}", Some(KEY), None),
    Row(
        "E: Conflicting values set for option Signed-By regarding source *: *",
        "the image has the repository {1} already, with another key",
        Some("Leave its [[repository]] out, or remove the other one from the base image."),
        None,
    ),
    Row(
        "E: The repository '*' is not signed.",
        "the repository {1} is not signed",
        Some(
            "Packages without a signature are not installed. Sign the repository, and give its `key`; if it is to be \
             trusted all the same, say `signed = false` in its [[repository]].",
        ),
        None,
    ),
    Row(
        "E: The repository '*' does not have a Release file.",
        "there is no repository at {1}",
        Some(
            "Check `url` and `suite`, if it is a [[repository]] of image.toml. If it is the image's own: is the release \
             still supported? A `mirror` in oven.toml can name an archive of old releases.",
        ),
        None,
    ),
    Row(
        "E: Failed to fetch *",
        "{1}",
        Some("Is the address reachable? `[network]` of oven.toml holds proxy and mirror."),
        None,
    ),
];

pub fn all() -> Vec<Trouble> {
    let own = |text: Option<&str>| text.map(str::to_owned);
    ROWS.iter()
        .map(|Row(output, means, hint, package)| Trouble {
            output: (*output).to_owned(),
            means: (*means).to_owned(),
            hint: own(*hint),
            package: own(*package),
        })
        .collect()
}
