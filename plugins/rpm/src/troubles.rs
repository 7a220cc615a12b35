//! Explains rpm's own messages, which are the same for all package managers.

use oven_distro::Trouble;

const SCRIPT: Option<&str> = Some(
    "A script of the package failed. While it runs, no service can be started and there is no network (unless \
     image.toml says `network = true`).",
);
pub const LARGER_DISK: Option<&str> = Some("Give it a larger disk: `size_gib` of `[disk]` in image.toml.");

pub fn trouble(output: &str, means: &str, hint: Option<&str>, package: Option<&str>) -> Trouble {
    Trouble {
        output: output.to_owned(),
        means: means.to_owned(),
        hint: hint.map(str::to_owned),
        package: package.map(str::to_owned),
    }
}

/// Messages of failed steps.
pub fn troubles() -> Vec<Trouble> {
    vec![
        script_failed(),
        trouble(
            "*needs * more space on the * filesystem*",
            "there is no space left in the image",
            LARGER_DISK,
            None,
        ),
        trouble(
            "*more space needed on the * filesystem*",
            "there is no space left in the image",
            LARGER_DISK,
            None,
        ),
    ]
}

/// Messages that mean a failure although the exit status is 0. rpm continues if a script fails after the files were
/// installed.
pub fn failures() -> Vec<Trouble> {
    vec![script_failed()]
}

/// Matches `warning: %post(site-1.0-1.noarch) scriptlet failed, exit status 1`. dnf 5 prints another text at the
/// beginning of the line.
fn script_failed() -> Trouble {
    trouble("*%*(*) scriptlet failed, *", "the %{2} script of the package `{3}` failed ({4})", SCRIPT, None)
}

/// Messages about configuration files that both the image and a package changed.
pub fn notes() -> Vec<Trouble> {
    let merge = Some("Merge them in a [[run]] or a [[file]].");
    vec![
        trouble(
            "*warning: * created as *.rpmnew",
            "{2} is unchanged; the package's version is {3}.rpmnew",
            merge,
            None,
        ),
        trouble(
            "*warning: * saved as *.rpmsave",
            "{2} now has the package's version; the image's version is {3}.rpmsave",
            merge,
            None,
        ),
        trouble(
            "*warning: * saved as *.rpmorig",
            "{2} now has the package's version; the image's version is {3}.rpmorig",
            merge,
            None,
        ),
    ]
}
