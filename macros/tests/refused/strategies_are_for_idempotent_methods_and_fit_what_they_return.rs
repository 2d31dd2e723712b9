#[hopline::service]
trait Demo {
    #[rpc(retry_on(MathError::Busy))]
    async fn get(&self) -> Result<u8, MathError>;
    #[rpc(hedge)]
    async fn late(&self) -> u8;
    #[rpc(fork = 2)]
    async fn both(&self) -> u8;
    #[rpc(fail_back)]
    async fn note(&self);
    #[rpc(idempotent, retry_on = "MathError::Busy")]
    async fn text(&self) -> Result<u8, MathError>;
    #[rpc(idempotent, retry_on(MathError::Busy))]
    async fn plain(&self) -> u8;
    #[rpc(idempotent, fork = 1)]
    async fn alone(&self) -> u8;
    #[rpc(idempotent, fork = 2, hedge)]
    async fn all(&self) -> u8;
    #[rpc(idempotent, fail_back)]
    async fn answered(&self) -> Result<u8, MathError>;
    #[rpc(oneway, hedge)]
    async fn sent(&self);
}

fn main() {}
