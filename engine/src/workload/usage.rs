//! One id of a workload: the versions sent under it and which of them counts.
//!
//! Everything about id `n` comes from stream `n` of the seed, so that it does not depend on the ids
//! before it.

use meterr_operators::rng::Rng;
use meterr_operators::time::Time;

use super::Options;
use super::draw::{FEATURES, MODELS, Zipf, trace};

/// Names of orgs and users. Zero-padded, so that they ascend as their indices do.
pub(super) struct Names {
    org_width: usize,
    user_width: usize,
    /// Index of the first user of each org, and one past the last.
    first_user: Vec<u32>,
}

impl Names {
    pub(super) fn org(&self, org: u32) -> String {
        format!("org_{org:0width$}", width = self.org_width)
    }

    pub(super) fn org_of(&self, user: u32) -> u32 {
        (self.first_user.partition_point(|first| *first <= user) - 1) as u32
    }

    pub(super) fn user(&self, user: u32) -> String {
        let org = self.org_of(user);
        let of_org = user - self.first_user[org as usize];
        let (org_width, user_width) = (self.org_width, self.user_width);
        format!("u{org:0org_width$}_{of_org:0user_width$}")
    }
}

/// What one version says was used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Usage {
    pub(super) time_ms: i64,
    pub(super) org: u32,
    /// Counted through all orgs.
    pub(super) user: u32,
    pub(super) model: u32,
    pub(super) feature: u32,
    pub(super) input: u32,
    pub(super) cached: u32,
    pub(super) output: u32,
}

/// One line to send.
#[derive(Debug, Clone, Copy)]
pub(super) struct Version {
    pub(super) usage: Usage,
    pub(super) revision: u32,
    pub(super) void: bool,
    /// How many ids later it is sent.
    pub(super) delay: u64,
}

/// All lines under one id.
pub(super) struct Plan {
    pub(super) id: String,
    /// Time of revision 0.
    pub(super) first_time_ms: i64,
    pub(super) versions: Vec<Version>,
    /// What counts in the end.
    pub(super) counted: Option<Usage>,
    pub(super) late: bool,
    pub(super) duplicated: bool,
    pub(super) corrected: bool,
    pub(super) voided: bool,
    pub(super) out_of_order: bool,
}

/// Draws plans.
pub(super) struct Source {
    options: Options,
    orgs: Zipf,
    users: Zipf,
    models: Zipf,
    trace: Vec<(u32, u32)>,
    pub(super) names: Names,
}

fn digits(n: u32) -> usize {
    n.to_string().len()
}

impl Source {
    pub(super) fn new(options: &Options) -> Source {
        let orgs = Zipf::new(options.orgs, options.zipf);
        let mut first_user = vec![0];
        let mut users_max = 1;
        for org in 0..options.orgs {
            let users = orgs.share(org, options.users).max(1);
            users_max = users_max.max(users);
            first_user.push(first_user[org as usize] + users);
        }
        Source {
            options: options.clone(),
            users: Zipf::new(users_max, options.zipf),
            models: Zipf::new(MODELS.len() as u32, 0.8),
            trace: trace(),
            names: Names {
                org_width: digits(options.orgs - 1).max(4),
                user_width: digits(users_max - 1).max(5),
                first_user,
            },
            orgs,
        }
    }

    fn draw_user(&self, rng: &mut Rng, org: u32) -> u32 {
        let first = self.names.first_user[org as usize];
        let users = self.names.first_user[org as usize + 1] - first;
        first + self.users.draw_among(rng, users)
    }

    fn draw_tokens(&self, rng: &mut Rng) -> (u32, u32, u32) {
        let (input, output) = *rng.pick(&self.trace);
        let cached = if rng.percent(30) { rng.below(u64::from(input)) as u32 } else { 0 };
        (input, cached, output)
    }

    /// The lines of id `n`.
    pub(super) fn plan(&self, n: u64) -> Plan {
        let options = &self.options;
        let mut rng = Rng::stream(options.seed, n);
        let start = options.start.0.div_euclid(1_000);
        let span = i64::from(options.days) * 86_400_000;
        // Evenly spread, with the place inside its share at random: ascending by `n`.
        let part = i128::from(n) * 1_000 + i128::from(rng.below(1_000));
        let arrival =
            start + (i128::from(span) * part / (i128::from(options.events) * 1_000)) as i64;
        let late = rng.chance(options.late_ppm);
        let time_ms = if late {
            (arrival - rng.between(0, i64::from(options.late_hours_max) * 3_600_000)).max(start)
        } else {
            arrival
        };
        let org = self.orgs.draw(&mut rng);
        let (input, cached, output) = self.draw_tokens(&mut rng);
        let first = Usage {
            time_ms,
            org,
            user: self.draw_user(&mut rng, org),
            model: self.models.draw(&mut rng),
            feature: rng.below(FEATURES.len() as u64) as u32,
            input,
            cached,
            output,
        };
        let mut plan = Plan {
            // An odd factor makes ids of one seed differ, and look as random as real ones.
            id: format!(
                "{:016x}{:04x}",
                n.wrapping_mul(0x9e37_79b9_7f4a_7c15),
                options.seed & 0xffff
            ),
            first_time_ms: time_ms,
            versions: vec![Version { usage: first, revision: 0, void: false, delay: 0 }],
            counted: Some(first),
            late,
            duplicated: rng.chance(options.duplicate_ppm),
            corrected: rng.chance(options.correction_ppm),
            voided: rng.chance(options.void_ppm),
            out_of_order: false,
        };
        if plan.corrected {
            let usage = self.corrected(&mut rng, first, start);
            let delay = self.draw_delay(&mut rng);
            plan.versions.push(Version { usage, revision: 1, void: false, delay });
            plan.counted = Some(usage);
        }
        if plan.voided {
            let revision = plan.versions.len() as u32;
            let delay = self.draw_delay(&mut rng);
            plan.versions.push(Version { usage: first, revision, void: true, delay });
            plan.counted = None;
        }
        // A tenth of the ids with several versions: the last one comes first.
        if plan.versions.len() > 1 && rng.percent(10) {
            let last = plan.versions.len() - 1;
            let delay = plan.versions[last].delay;
            plan.versions[last].delay = 0;
            plan.versions[0].delay = delay;
            plan.out_of_order = true;
        }
        if plan.duplicated {
            // Again in the words of the first version, before or after its corrections.
            let delay = self.draw_delay(&mut rng);
            plan.versions.push(Version { delay, ..plan.versions[0] });
        }
        plan
    }

    fn draw_delay(&self, rng: &mut Rng) -> u64 {
        1 + rng.below(self.options.resend_distance_max)
    }

    /// What a correction says: other tokens, user, model or time.
    fn corrected(&self, rng: &mut Rng, first: Usage, start_ms: i64) -> Usage {
        let mut usage = first;
        match rng.below(4) {
            0 => (usage.input, usage.cached, usage.output) = self.draw_tokens(rng),
            1 => usage.user = self.draw_user(rng, first.org),
            2 => usage.model = self.models.draw(rng),
            _ => usage.time_ms = (first.time_ms - rng.between(1, 86_400_000)).max(start_ms),
        }
        usage
    }

    /// A version as native JSON, with its line end.
    pub(super) fn render(&self, plan: &Plan, version: &Version, into: &mut String) {
        use std::fmt::Write as _;
        let usage = &version.usage;
        let time = |ms: i64| Time(ms * 1_000);
        let (id, org) = (&plan.id, self.names.org(usage.org));
        let result = if version.void {
            writeln!(
                into,
                r#"{{"id":"{id}","time":"{}","org":"{org}","revision":{},"void":true}}"#,
                time(usage.time_ms),
                version.revision
            )
        } else {
            let model = MODELS[usage.model as usize];
            let mut result = write!(
                into,
                concat!(
                    r#"{{"id":"{}","time":"{}","org":"{}","user":"{}","provider":"{}","model":"{}","#,
                    r#""feature":"{}","input_tokens":{},"cached_input_tokens":{},"output_tokens":{}"#
                ),
                id,
                time(usage.time_ms),
                org,
                self.names.user(usage.user),
                model.provider,
                model.name,
                FEATURES[usage.feature as usize],
                usage.input,
                usage.cached,
                usage.output
            );
            if version.revision > 0 {
                result = result.and_then(|()| write!(into, r#","revision":{}"#, version.revision));
            }
            if usage.time_ms != plan.first_time_ms {
                let first = time(plan.first_time_ms);
                result = result.and_then(|()| write!(into, r#","original_time":"{first}""#));
            }
            result.and_then(|()| writeln!(into, "}}"))
        };
        result.expect("writing to a string cannot fail");
    }
}
