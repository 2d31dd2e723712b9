#[hopline::service]
trait Demo {
    #[rpc(dedup)]
    async fn put(&self);
    #[rpc(dedup = "0s")]
    async fn set(&self);
    #[rpc(oneway, dedup = "1h")]
    async fn log(&self);
}

fn main() {}
