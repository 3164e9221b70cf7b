//! Explains why a machine cannot be built, in terms of its configuration.
use config::{
    MachineConfig,
    cli::{Places, Problems},
};
use machine::BuildError;

/// What keeps the machine that `config` describes from being built, each error with the place in
/// the configuration that asked for it.
pub fn explain(places: &Places, errors: Vec<BuildError>, config: &MachineConfig) -> Problems {
    let described = |error: BuildError| (error.part(), format!("{:#}", anyhow::Error::from(error)));
    places.explain(errors.into_iter().map(described), config)
}
