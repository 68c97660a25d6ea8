use super::*;
pub(super) type Hook = std::sync::Arc<dyn Fn(&str) -> Result<(), Fail> + Send + Sync>;
