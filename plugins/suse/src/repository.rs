//! The definition's repositories, as files for zypper.

use oven_distro::{Job, Phase, Plan, Refused, Repository, Shim, Step};
use oven_rpm::{step, words};

const DIRECTORY: &str = "/etc/zypp/repos.d";

/// Adds the repositories to the plan. Repositories that stay become files of the image. The others exist only while the
/// plan's steps run. Returns steps that import the repositories' keys into rpm, because otherwise zypper would ask
/// whether it may trust a key.
pub fn add(job: &Job, plan: &mut Plan) -> Result<Vec<Step>, Refused> {
    let mut steps = Vec::new();
    for repository in &job.repositories {
        let file = file(repository)?;
        let files = if repository.keep { &mut plan.files } else { &mut plan.shims };
        files.push(file);
        files.extend(oven_rpm::key(repository));
        if repository.key.is_some() {
            let why = format!("trusting the key of the repository {}", repository.name);
            let argv = words(["rpm", "--import", &oven_rpm::key_file(repository)]);
            steps.push(step(Phase::Prepare, &why, argv));
        }
    }
    Ok(steps)
}

fn file(repository: &Repository) -> Result<Shim, Refused> {
    oven_rpm::check_repository(repository)?;
    let Repository { name, url, key, .. } = repository;
    let mut text =
        format!("# Added by oven.\n[{name}]\nname={name}\nbaseurl={url}\nenabled=1\nautorefresh=0\n");
    // The signature of each package is checked. So the index need not be signed. Most indexes are not signed.
    match key {
        Some(_) => {
            let key = oven_rpm::key_file(repository);
            text += &format!("gpgcheck=1\nrepo_gpgcheck=0\npkg_gpgcheck=1\ngpgkey=file://{key}\n");
        }
        None => {
            text +=
                "# The definition says that it is not signed.\ngpgcheck=0\nrepo_gpgcheck=0\npkg_gpgcheck=0\n"
        }
    }
    text += &oven_rpm::priority_line(repository);
    Ok(Shim { path: format!("{DIRECTORY}/{name}.repo"), content: text, mode: 0o644 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_cannot_smuggle_settings_in() {
        let of = |name: &str, url: &str| {
            let (name, url) = (name.to_owned(), url.to_owned());
            let repository = Repository {
                name,
                url,
                key: None,
                suite: None,
                components: Vec::new(),
                keep: true,
                priority: None,
            };
            file(&repository).map(|shim| shim.content).map_err(|refused| refused.0)
        };
        assert!(of("mine", "https://example.org/$releasever/").unwrap().contains("gpgcheck=0\n"));
        for (name, url) in [
            ("../x", "http://x/"),
            ("a]\n[b", "http://x/"),
            ("a", "http://x/\ngpgcheck=0"),
            ("a", "x"),
            ("", "http://x/"),
        ] {
            assert!(of(name, url).is_err(), "{name} {url}");
        }
    }
}
