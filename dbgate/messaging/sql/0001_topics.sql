-- Topics: messages that every subscriber sees, once, in one order.
--
-- Ids come from a sequence, and so are given out before their transactions commit: a reader that followed
-- "id > cursor" would skip what commits late. An in-flight watermark prevents it:
--
--   publish  (1) read the sequence's last value, `low`;
--            (2) take a shared advisory lock whose key holds the topic's hash (24 bits) and `low` (40 bits);
--            (3) only then draw ids and insert. The lock goes by itself at the end of the transaction, after
--                its rows have become visible (or never will).
--   read     (1) `high` = the sequence's last value;
--            (2) `low` = the least such value among the topic's locks in pg_locks;
--            (3) the rows with  cursor < id <= least(high, low).  Each step has a snapshot of its own.
--
-- A publisher with an id up to `high` took its lock before it drew that id. So at step 2 it either still
-- holds the lock, and `low` is below its id; or it has finished, and step 3 sees its row if there is one.
-- Shared locks do not wait for each other, and a transaction that publishes nothing has none.

-- Which installation, and which history of it, a cursor belongs to.
create table dbgate.installation (
    id         bigint not null,
    created_at timestamptz not null default clock_timestamp()
);
insert into dbgate.installation (id) values (floor(random() * 2147483648)::bigint);

create function dbgate.epoch() returns bigint
language sql stable as $$
    select (installation.id << 32)
         | ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint
    from dbgate.installation
$$;
comment on function dbgate.epoch() is
    'The installation (31 bits) and the WAL''s timeline (32 bits), which changes at a failover.';

-- Never with a larger cache: a session would draw ids that were set aside before it took its lock.
create sequence dbgate.message_id as bigint minvalue 0 start 0 cache 1;
select nextval('dbgate.message_id');  -- from here on, last_value is an id that was given out

create table dbgate.message (
    topic        text collate "C" not null check (octet_length(topic) between 1 and 255),
    id           bigint not null,
    published_at timestamptz not null,
    payload      json not null,
    headers      json not null,
    -- The only index: there is no other order in which the planner could be tempted to read.
    primary key (topic, id)
);

create function dbgate.topic_hash(topic text) returns bigint
language sql immutable as $$
    -- 24 bits, but neither all zeros nor all ones: the advisory locks that applications take on small
    -- numbers are no publishers' locks.
    select 1 + (hashtextextended(topic, 0) & 16777215) % 16777214
$$;

create function dbgate.topic_key(topic text) returns text
language sql immutable as $$
    select left(encode(sha256(convert_to(topic, 'UTF8')), 'hex'), 12)
$$;
comment on function dbgate.topic_key(text) is 'What stands for a topic in a notification.';

create function dbgate.publish_batch(topics text[], payloads text[], headers text[])
returns table (id bigint, published_at timestamptz, epoch bigint)
language plpgsql as $$
#variable_conflict use_column
declare
    low  bigint;
    hash bigint;
    -- The hashes that this transaction has locked already. A setting, since the rollback of a savepoint
    -- takes it back together with the locks.
    held text := coalesce(nullif(current_setting('dbgate.held', true), ''), ',');
begin
    select last_value into low from dbgate.message_id;
    for hash in select distinct dbgate.topic_hash(wanted) from unnest(topics) wanted loop
        if strpos(held, ',' || hash || ',') = 0 then
            perform pg_advisory_xact_lock_shared((hash << 40) | (low & 1099511627775));
            held := held || hash || ',';
        end if;
    end loop;
    perform set_config('dbgate.held', held, true);
    return query
        insert into dbgate.message (topic, id, published_at, payload, headers)
        select given.topic, nextval('dbgate.message_id'), clock_timestamp(),
               given.payload::json, given.headers::json
        from (
            select * from unnest(topics, payloads, headers) with ordinality
                as each (topic, payload, headers, place)
            order by place
        ) given
        returning message.id, message.published_at, dbgate.epoch();
end
$$;

create function dbgate.publish(topic text, payload json, headers json default '{}')
returns bigint
language plpgsql as $$
declare
    new_id bigint;
begin
    select published.id into new_id
    from dbgate.publish_batch(array[topic], array[payload::text], array[headers::text]) published;
    perform pg_notify('dbgate', dbgate.topic_key(topic));
    return new_id;
end
$$;
comment on function dbgate.publish(text, json, json) is
    'Publish from a trigger, from psql, or from another language: wakes the subscribers at commit.';

create function dbgate.read_batch(
    topics text[], after bigint[], settled bigint[], max_count int
)
returns table (
    topic text, bound bigint, held boolean, epoch bigint,
    id bigint, published_at timestamptz, payload text, headers text
)
language plpgsql volatile as $$
#variable_conflict use_column
declare
    high   bigint;
    lows   bigint[];
begin
    if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
        raise exception 'topics are read with the isolation level READ COMMITTED'
            using errcode = 'invalid_transaction_state',
                  detail = 'In one snapshot for all steps, messages that commit late would be skipped.';
    end if;
    select last_value into high from dbgate.message_id;
    select array_agg(least(high, coalesce(in_flight.low, high)) order by wanted.place) into lows
    from unnest(topics) with ordinality as wanted (topic, place)
    left join (
        select classid::bigint >> 8 as hash,
               min((classid::bigint & 255) << 32 | objid::bigint) as low
        from pg_locks
        where locktype = 'advisory' and objsubid = 1 and mode = 'ShareLock'
          and database = (select oid from pg_database where datname = current_database())
        group by 1
    ) in_flight on in_flight.hash = dbgate.topic_hash(wanted.topic);
    return query
        select wanted.topic, reached.bound, wanted.low < high, dbgate.epoch(),
               found.id, found.published_at, found.payload::text, found.headers::text
        from unnest(topics, after, settled, lows) as wanted (topic, after, settled, low)
        -- What an earlier read has settled stays so, whatever `low` a new publisher comes with.
        cross join lateral (select greatest(wanted.low, wanted.settled) as bound) reached
        left join lateral (
            select * from dbgate.message
            where message.topic = wanted.topic
              and message.id > coalesce(wanted.after, reached.bound)
              and message.id <= reached.bound
            order by message.id
            limit max_count
        ) found on true
        order by found.id;
end
$$;
comment on function dbgate.read_batch(text[], bigint[], bigint[], int) is
    'Messages after a position, per topic up to its bound; at least one row for each topic.';
