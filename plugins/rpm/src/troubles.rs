//! What rpm's own words mean, whichever package manager calls it.

use oven_distro::Trouble;

const SCRIPT: Option<&str> = Some(
    "A script of the package failed. While it runs, no service can be started and there is no network (unless \
     image.toml says `network = true`).",
);
pub const LARGER: Option<&str> = Some("Give it a larger disk: `size_gib` of `[disk]` in image.toml.");

pub fn trouble(output: &str, means: &str, hint: Option<&str>, package: Option<&str>) -> Trouble {
    Trouble {
        output: output.to_owned(),
        means: means.to_owned(),
        hint: hint.map(str::to_owned),
        package: package.map(str::to_owned),
    }
}

/// What a failed step's lines mean.
pub fn troubles() -> Vec<Trouble> {
    vec![
        script(),
        trouble(
            "*needs * more space on the * filesystem*",
            "there is no space left in the image",
            LARGER,
            None,
        ),
        trouble(
            "*more space needed on the * filesystem*",
            "there is no space left in the image",
            LARGER,
            None,
        ),
    ]
}

/// rpm goes on where a script fails that runs after the files are there, and ends with 0.
pub fn failures() -> Vec<Trouble> {
    vec![script()]
}

/// `warning: %post(site-1.0-1.noarch) scriptlet failed, exit status 1`; dnf 5 puts words of its own before it.
fn script() -> Trouble {
    trouble("*%*(*) scriptlet failed, *", "the %{2} script of the package `{3}` failed ({4})", SCRIPT, None)
}

/// What became of configuration files that both the image and a package changed, and which keys are trusted now.
pub fn notes() -> Vec<Trouble> {
    let merge = Some("Merge them in a [[run]] or a [[file]].");
    vec![
        trouble("*warning: * created as *.rpmnew", "{2} stays; the package's is {3}.rpmnew", merge, None),
        trouble(
            "*warning: * saved as *.rpmsave",
            "{2} is the package's now; the image's is {3}.rpmsave",
            merge,
            None,
        ),
        trouble(
            "*warning: * saved as *.rpmorig",
            "{2} is the package's now; the image's is {3}.rpmorig",
            merge,
            None,
        ),
    ]
}
