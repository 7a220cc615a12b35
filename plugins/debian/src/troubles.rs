//! Explains messages of apt and dpkg to the author of a definition.

use oven_distro::{Job, Package, Trouble};

struct Row(&'static str, &'static str, Option<&'static str>, Option<&'static str>);

/// Says that image.toml has to be changed, but that no single package is the cause.
const NO_SINGLE_PACKAGE: Option<&str> = Some("");
const SEARCH: Option<&str> = Some("Check its spelling, and which repositories the base image has.");
const INCOMPATIBLE: Option<&str> =
    Some("The lines above say which packages conflict with each other or with the base image.");
const KEY: &str =
    "If the repository has a [[repository]] in image.toml, check its `key`: repositories change their keys.";
const SCRIPT: Option<&str> = Some(
    "A script of the package failed. While it runs, no service can be started and there is no network (unless \
     image.toml says `network = true`).",
);

/// The most specific rows come first, because apt also prints general messages if packages are incompatible.
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
        Some("`*` stands for any text; an epoch, such as the `5:` of `5:7.0.*`, is part of a version."),
        Some("{2}"),
    ),
    Row(
        "E: Release '*' for '*' was not found",
        "no repository of the image has `{2}` in the suite `{1}`",
        Some(
            "Check the spelling of the suite, and whether the image has it: a [[repository]] of image.toml adds it with its \
             `suite`.",
        ),
        Some("{2}"),
    ),
    Row(
        "E: The value '*' is invalid for APT::Default-Release *",
        "no repository of the image has the suite `{1}`, which `packages` names",
        Some(
            "Check the spelling of the suite, and whether the image has it: a [[repository]] of image.toml adds it with its \
             `suite`.",
        ),
        NO_SINGLE_PACKAGE,
    ),
    Row(
        "E: Package '*' has no installation candidate",
        "`{1}` cannot be installed: it is virtual, or no repository has it any more",
        Some("If it is virtual, name one of the packages that provide it; the lines above list them."),
        Some("{1}"),
    ),
    Row("dpkg: error processing package * (*):", "the package `{1}` could not be configured", SCRIPT, None),
    Row("dpkg: error processing archive * (*):", "the package file {1} could not be unpacked", None, None),
    Row(
        "E: Unable to correct problems, you have held broken packages.",
        "the packages cannot be installed together",
        INCOMPATIBLE,
        NO_SINGLE_PACKAGE,
    ),
    Row(
        "E: Unmet dependencies.*",
        "the packages cannot be installed together",
        INCOMPATIBLE,
        NO_SINGLE_PACKAGE,
    ),
    Row(
        "E: Essential packages were removed*",
        "installing the packages would remove an essential package",
        INCOMPATIBLE,
        NO_SINGLE_PACKAGE,
    ),
    Row(
        "E: Held packages were changed*",
        "the installation would change a package that the base image holds",
        Some("Release it in the base image (`apt-mark unhold`), or leave it out."),
        NO_SINGLE_PACKAGE,
    ),
    Row(
        "E: You don't have enough free space in *.",
        "there is no space left in {1} for the downloads",
        Some(
            "Downloads are cached on this machine: free some space there. If they are not, give the image a larger disk: \
             `size_gib` of `[disk]` in image.toml.",
        ),
        None,
    ),
    Row(
        "*GPG error: *: *NO_PUBKEY *",
        "the repository {2} is signed by a key that is not configured for it: {4}",
        Some(KEY),
        None,
    ),
    Row("*GPG error: *: *EXPKEYSIG *", "the key of the repository {2} has expired: {4}", Some(KEY), None),
    Row("*GPG error: *: *REVKEYSIG *", "the key of the repository {2} was revoked: {4}", Some(KEY), None),
    Row(
        "*GPG error: *: *BADSIG *",
        "the repository {2} has an invalid signature by {4}",
        Some(
            "The downloaded index differs from the signed one: does a proxy or a mirror change it, or is the mirror being updated?",
        ),
        None,
    ),
    Row("*GPG error: *: *", "the signature of the repository {2} cannot be verified: {3}", Some(KEY), None),
    Row(
        "E: Conflicting values set for option Signed-By regarding source *: *",
        "the image already has the repository {1}, with another key",
        Some("Remove its [[repository]] from image.toml, or the other one from the base image."),
        None,
    ),
    Row(
        "E: The repository '*' is not signed.",
        "the repository {1} is not signed",
        Some(
            "Unsigned packages are not installed. Sign the repository, and set its `key`. To trust it without a \
             signature, set `signed = false` in its [[repository]].",
        ),
        None,
    ),
    Row(
        "E: The repository '*' does not have a Release file.",
        "there is no repository at {1}",
        Some(
            "If it is a [[repository]] of image.toml, check `url` and `suite`. If it is the image's own: is the release \
             still supported? `mirror` in oven.toml can name an archive of old releases.",
        ),
        None,
    ),
    Row(
        "E: Release file for * is expired *",
        "the index of the repository {1} has expired {2}",
        Some(
            "The mirror is no longer updated: set another `mirror` in [network] of oven.toml. If this machine's clock is \
             wrong (`date`), correct it.",
        ),
        None,
    ),
    Row(
        "E: Release file for * is not valid yet *",
        "the index of the repository {1} is not valid yet {2}",
        Some("This machine's clock is wrong: compare `date` with another machine."),
        None,
    ),
    Row(
        "*Mirror sync in progress*",
        "the mirror is being updated: its index and its files do not fit together",
        Some("Bake again in some minutes, or set another `mirror` in [network] of oven.toml."),
        None,
    ),
    Row(
        "*Hash Sum mismatch*",
        "a downloaded file differs from the repository's index",
        Some(
            "Bake again in some minutes: the mirror may be being updated. Or set another `mirror` in [network] of oven.toml.",
        ),
        None,
    ),
    Row(
        "E: Failed to fetch *",
        "{1}",
        Some("Is the address reachable? `[network]` of oven.toml sets proxy and mirror."),
        None,
    ),
];

pub fn troubles(job: &Job) -> Vec<Trouble> {
    let to_owned = |text: Option<&str>| text.map(str::to_owned);
    let suite = suite_hint(job);
    ROWS.iter()
        .map(|Row(output, means, hint, package)| Trouble {
            output: (*output).to_owned(),
            means: (*means).to_owned(),
            hint: match (&suite, *hint) {
                (Some(suite), hint) if hint == INCOMPATIBLE => {
                    Some(format!("{}{suite}", hint.unwrap_or_default()))
                }
                (_, hint) => to_owned(hint),
            },
            package: to_owned(*package),
        })
        .collect()
}

/// The maximal number of suites that a hint names.
const MAX_SUITES: usize = 3;

/// Says how to take a package and its dependencies from another suite. `None` if no package of the job can be meant: one
/// with a version, or any if the definition adds a suite.
fn suite_hint(job: &Job) -> Option<String> {
    let own = job.os_release.get("VERSION_CODENAME");
    let suites = job.repositories.iter().filter_map(|repository| repository.suite.as_deref());
    let added: Vec<_> = suites.filter(|suite| Some(*suite) != own && !suite.ends_with('/')).collect();
    let named = job.packages.iter().filter_map(|package| match package {
        Package::Named { name, version, suite: None } => Some((name, version)),
        _ => None,
    });
    let with_version = named.clone().find(|(_, version)| version.is_some());
    let (name, version) = with_version.or_else(|| named.clone().next().filter(|_| !added.is_empty()))?;
    let (suites, placeholder) = match &added[..] {
        [] => (&["SUITE"][..], " (with the suite's name)"),
        added => (&added[..added.len().min(MAX_SUITES)], ""),
    };
    let version = version.as_ref().map(|version| format!("={version}")).unwrap_or_default();
    let spelt: Vec<_> = suites.iter().map(|suite| format!("\"{name}/{suite}{version}\"")).collect();
    Some(format!(
        " A newer version may need other packages of its suite, too. Then name the suite in `packages`: \
         {}{placeholder}. Or set the `priority` of its [[repository]], if all packages should come from there.",
        spelt.join(" or ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use oven_distro::{OsRelease, Repository};

    #[test]
    fn the_hint_for_incompatible_packages_names_the_suite() {
        let named = |name: &str, version: Option<&str>, suite: Option<&str>| Package::Named {
            name: name.into(),
            version: version.map(str::to_owned),
            suite: suite.map(str::to_owned),
        };
        let hint = |packages: &[Package], suites: &[&str]| {
            let repository = |suite: &&str| Repository {
                name: "x".into(),
                url: "http://x/".into(),
                key: None,
                suite: Some((*suite).to_owned()),
                components: vec!["main".into()],
                keep: true,
                priority: None,
            };
            let job = Job {
                os_release: OsRelease::parse("ID=debian\nVERSION_CODENAME=bookworm\n"),
                packages: packages.to_vec(),
                repositories: suites.iter().map(repository).collect(),
                ..Job::default()
            };
            let troubles = troubles(&job).into_iter();
            let hints =
                troubles.filter(|trouble| trouble.means == "the packages cannot be installed together");
            hints.map(|trouble| trouble.hint.unwrap()).collect::<Vec<_>>()
        };
        let go = named("golang-go", Some("2:1.2*"), None);
        for (packages, suites, expected) in [
            (
                vec![named("jq", None, None), go.clone()],
                vec!["bookworm-backports"],
                "\"golang-go/bookworm-backports=2:1.2*\"",
            ),
            (vec![go], vec![], "\"golang-go/SUITE=2:1.2*\" (with the suite's name)"),
            (vec![named("jq", None, None)], vec!["bookworm", "trixie"], "\"jq/trixie\""),
            (vec![named("jq", None, None)], vec!["sid", "trixie"], "\"jq/sid\" or \"jq/trixie\""),
        ] {
            for hint in hint(&packages, &suites) {
                assert!(hint.contains(expected) && hint.contains("`priority`"), "{hint}");
            }
        }
        // Without a version and another suite, or with the suite, it is not the advice.
        for (packages, suites) in [
            (vec![named("jq", None, None)], vec!["bookworm"]),
            (vec![named("jq", Some("1.7*"), Some("trixie"))], vec!["trixie"]),
            (vec![], vec!["trixie"]),
        ] {
            assert!(hint(&packages, &suites).iter().all(|hint| Some(&**hint) == INCOMPATIBLE));
        }
    }
}
