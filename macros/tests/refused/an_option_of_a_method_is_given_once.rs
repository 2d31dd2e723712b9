#[hopline::service]
trait Demo {
    #[rpc(idempotent, idempotent)]
    async fn put(&self);
    #[rpc(timeout = "1s")]
    #[rpc(timeout = "2s")]
    async fn set(&self);
}

fn main() {}
