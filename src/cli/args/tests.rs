use super::*;
use clap::FromArgMatches;

#[test]
fn the_command_line_is_consistent_and_fits_80_columns() {
    Cli::command().debug_assert();
    let command = command();
    let mut commands = vec![command];
    while let Some(mut command) = commands.pop() {
        let help = command.render_long_help().to_string();
        let long = help.lines().find(|line| line.chars().count() > 80);
        assert_eq!(long, None, "in the help of {}", command.get_name());
        commands.extend(command.get_subcommands().cloned());
    }
}

#[test]
fn global_flags_go_before_and_after_the_verb() {
    for line in ["oven --region-dir R --json bake web", "oven bake web --region-dir R --json"] {
        let matches = command().try_get_matches_from(line.split(' ')).unwrap();
        let cli = Cli::from_arg_matches(&matches).unwrap();
        assert_eq!((cli.global.region_dir, cli.global.json), (Some("R".into()), true));
    }
}
