//! `meterr config check` and `meterr config print`.

use serde_json::json;
use toml::{Table, Value};

use super::args::ConfigCommand;
use super::{Console, Exit, settings};
use crate::config::{self, ConfigError, Loaded};

/// `meterr config …`
pub(super) fn configuration(
    command: &ConfigCommand,
    environment: &[(String, String)],
    console: &mut Console,
) -> anyhow::Result<Exit> {
    match command {
        ConfigCommand::Check(args) => {
            let result = settings(&args.config, environment, Vec::new());
            if !args.json {
                let loaded = result?;
                // By a file, the environment or a flag, be it to the default.
                let values = match loaded.origins.len() {
                    0 => "all values are the default".to_owned(),
                    1 => "1 value is set".to_owned(),
                    set => format!("{set} values are set"),
                };
                writeln!(console.out, "configuration is valid; {values}")?;
                return Ok(Exit::Done);
            }
            match result {
                Ok(_) => {
                    console.json(&json!({"valid": true, "problems": []}))?;
                    Ok(Exit::Done)
                }
                Err(error) => {
                    let Some(ConfigError::Invalid(problems)) = error.downcast_ref() else {
                        return Err(error);
                    };
                    let problems: Vec<_> = problems
                        .iter()
                        .map(|p| {
                            json!({"key": p.key, "value": p.value, "origin": p.origin.to_string(),
                                   "expected": p.expected})
                        })
                        .collect();
                    console.json(&json!({"valid": false, "problems": problems}))?;
                    Ok(Exit::Usage)
                }
            }
        }
        ConfigCommand::Print(args) if args.defaults => {
            console.out.write_all(config::DEFAULTS.as_bytes())?;
            Ok(Exit::Done)
        }
        ConfigCommand::Print(args) => {
            let mut loaded = settings(&args.config, environment, Vec::new())?;
            // It may hold a password.
            loaded.raw.nats.url = meterr_connectors::nats::connection::shown(&loaded.raw.nats.url);
            if args.json {
                console.json(&serde_json::to_value(&loaded.raw)?)?;
            } else {
                console.out.write_all(printed(&loaded)?.as_bytes())?;
            }
            Ok(Exit::Done)
        }
    }
}

/// The configuration in force as TOML, each value that is not the default with its origin. Can be
/// used as a configuration file.
fn printed(loaded: &Loaded) -> anyhow::Result<String> {
    let mut text = String::new();
    section(&mut text, "", &Table::try_from(&loaded.raw)?, loaded);
    Ok(text)
}

fn section(text: &mut String, path: &str, table: &Table, loaded: &Loaded) {
    let key = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    for (name, value) in table.iter().filter(|(_, value)| !value.is_table()) {
        let origin = match loaded.origins.get(&key(name)) {
            Some(origin) => format!("  # from {}", origin.to_string().escape_debug()),
            None => String::new(),
        };
        text.push_str(&format!("{name} = {value}{origin}\n"));
    }
    for (name, value) in table {
        if let Value::Table(table) = value {
            let path = key(name);
            let gap = if text.is_empty() { "" } else { "\n" };
            text.push_str(&format!("{gap}[{path}]\n"));
            section(text, &path, table, loaded);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::run;
    use super::*;
    use crate::config::Sources;

    #[test]
    fn what_is_printed_loads_to_the_same_settings() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (dir.path().join("one.toml"), dir.path().join("other.toml"));
        std::fs::write(
            &one,
            "[seed.time_zones]\nacme = \"Europe/Berlin\"\n[epoch]\nage_max = \"7ms\"\n\
             [[views.declare]]\nname = \"v\"\nby = [\"user\"]\nwindow = \"day\"\n",
        )
        .unwrap();
        let ran = run(&["config", "print", "--config", one.to_str().unwrap()]);
        assert_eq!(ran.exit, Exit::Done, "{}", ran.err);
        assert!(ran.out.contains("age_max = \"7ms\"  # from "), "{}", ran.out);
        assert!(ran.out.contains("shards = 16\n"), "{}", ran.out);
        std::fs::write(&other, &ran.out).unwrap();
        let loaded = |path| {
            config::load(&Sources { file: Some(path), ..Sources::default() }).unwrap().settings
        };
        assert_eq!(loaded(one), loaded(other));
    }

    #[test]
    fn check_reports_every_problem_and_exits_with_two() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        std::fs::write(&file, "[node]\nshards = 0\nx = 1\n").unwrap();
        let file = file.to_str().unwrap();
        let ran = run(&["config", "check", "--config", file]);
        assert_eq!(ran.exit, Exit::Usage);
        assert!(ran.err.starts_with("error: 2 settings are wrong:\n  node.x"), "{}", ran.err);
        let ran = run(&["config", "check", "--config", file, "--json"]);
        assert_eq!(ran.exit, Exit::Usage);
        let answer: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
        assert_eq!(answer["problems"][1]["key"], "node.shards");
        assert_eq!(answer["problems"][1]["expected"], "must be 1 to 256");
        let ran = run(&["config", "check"]);
        assert_eq!((ran.exit, ran.err.as_str()), (Exit::Done, ""));
        assert_eq!(ran.out, "configuration is valid; all values are the default\n");
    }

    #[test]
    fn defaults_are_printed_with_their_comments() {
        assert_eq!(run(&["config", "print", "--defaults"]).out, config::DEFAULTS);
    }
}
