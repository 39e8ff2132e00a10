-- Questions that people ask of Pagila's schema, one statement to a line. "-- from 17" is about the next line: the
-- Postgres that first runs it. The schema itself needs 18.

-- plain
SELECT title, rental_rate FROM public.film WHERE rating = 'PG-13' AND length > 120 ORDER BY title LIMIT 20
SELECT * FROM public.category ORDER BY name
SELECT first_name || ' ' || last_name AS name, email FROM public.customer WHERE activebool AND store_id = 1
SELECT DISTINCT rating FROM public.film WHERE release_year BETWEEN 2000 AND 2006
SELECT count(*) FROM public.rental WHERE return_date IS NULL
SELECT title FROM public.film WHERE title ILIKE '%dinosaur%' OR description LIKE '%Shark%'
SELECT title FROM public.film WHERE title ~* '^(air|alad)' AND title !~ '\d'
SELECT film_id, title FROM public.film WHERE film_id IN (1, 2, 3) OR film_id = ANY (ARRAY[10, 20])
SELECT customer_id, create_date FROM public.customer ORDER BY create_date DESC NULLS LAST, customer_id LIMIT 10 OFFSET 30
SELECT address, coalesce(address2, 'none') AS second_line, nullif(postal_code, '') AS code FROM public.address WHERE district <> 'Texas'
SELECT title, CASE WHEN length < 60 THEN 'short' WHEN length < 120 THEN 'feature' ELSE 'long' END AS kind FROM public.film
SELECT city FROM public.city WHERE country_id IS DISTINCT FROM 44 ORDER BY country_id FETCH FIRST 5 ROWS WITH TIES
TABLE public.language
VALUES (1, 'one'), (2, 'two'), (3, 'three')
SELECT 1 + 2 * 3 AS seven, 7 % 4 AS three, 2 ^ 10 AS kilo, |/ 25 AS five, @ -5 AS plain
SELECT greatest(rental_rate, 2), least(replacement_cost, 20) FROM public.film WHERE NOT (rental_duration > 5)
SELECT title AS "Title of the Film", rental_rate::numeric(6, 3) AS rate, length::text, CAST(film_id AS bigint) FROM public.film LIMIT 3
SELECT title FROM public.film WHERE (rental_rate, length) > (2.99, 100) ORDER BY rental_rate, length
SELECT count(*) AS films, count(original_language_id) AS translated, count(DISTINCT rating) AS ratings FROM public.film
SELECT first_name COLLATE "C" FROM public.actor ORDER BY last_name COLLATE "C" DESC LIMIT 5
SELECT title FROM public.film WHERE special_features IS NOT NULL AND length_hours > 2
SELECT current_date AS today, now() AS moment, localtimestamp AS here, current_time AS clock, current_user AS me

-- joins
SELECT f.title, l.name FROM public.film f JOIN public.language l ON l.language_id = f.language_id
SELECT f.title, l.name AS spoken, o.name AS original FROM public.film f JOIN public.language l USING (language_id) LEFT JOIN public.language o ON o.language_id = f.original_language_id
SELECT a.first_name, a.last_name, count(*) AS films FROM public.actor a JOIN public.film_actor fa USING (actor_id) GROUP BY a.actor_id, a.first_name, a.last_name ORDER BY films DESC LIMIT 10
SELECT c.first_name, c.last_name, ci.city, co.country FROM public.customer c JOIN public.address a ON a.address_id = c.address_id JOIN public.city ci ON ci.city_id = a.city_id JOIN public.country co ON co.country_id = ci.country_id WHERE co.country = 'Italy'
SELECT f.title FROM public.film f LEFT JOIN public.inventory i ON i.film_id = f.film_id WHERE i.inventory_id IS NULL
SELECT f.title, i.inventory_id FROM public.inventory i RIGHT JOIN public.film f ON f.film_id = i.film_id AND i.store_id = 2
SELECT coalesce(s.store_id, c.store_id) AS store, count(c.customer_id) FROM public.store s FULL JOIN public.customer c ON c.store_id = s.store_id GROUP BY 1
SELECT s.store_id, r.rating FROM public.store s CROSS JOIN (SELECT DISTINCT rating FROM public.film) r
SELECT a.city, b.city FROM public.city a JOIN public.city b ON a.country_id = b.country_id AND a.city_id < b.city_id WHERE a.country_id = 6
SELECT category.name, film.title FROM public.category NATURAL JOIN public.film_category JOIN public.film USING (film_id) WHERE category.name IN ('Comedy', 'Drama')
SELECT f.title, p.total FROM public.film f, (SELECT i.film_id, sum(pay.amount) AS total FROM public.payment pay JOIN public.rental r ON r.rental_id = pay.rental_id JOIN public.inventory i ON i.inventory_id = r.inventory_id GROUP BY i.film_id) p WHERE p.film_id = f.film_id ORDER BY p.total DESC LIMIT 5
SELECT f.title FROM public.film f WHERE EXISTS (SELECT 1 FROM public.film_actor fa JOIN public.actor a USING (actor_id) WHERE fa.film_id = f.film_id AND a.last_name = 'GUINESS')
SELECT c.customer_id FROM public.customer c WHERE NOT EXISTS (SELECT FROM public.rental r WHERE r.customer_id = c.customer_id AND r.rental_date > now() - interval '1 year')
SELECT customer_id FROM public.customer WHERE customer_id NOT IN (SELECT customer_id FROM public.payment WHERE amount > 10)
SELECT title FROM public.film WHERE length > ALL (SELECT avg(length) FROM public.film GROUP BY rating)
SELECT title FROM public.film WHERE rental_rate = SOME (SELECT max(rental_rate) FROM public.film)
SELECT film_id, (SELECT count(*) FROM public.inventory i WHERE i.film_id = f.film_id) AS copies FROM public.film f
SELECT sl.name, sl.city, st.manager_staff_id FROM public.staff_list sl JOIN public.store st ON st.store_id = sl.sid
SELECT * FROM (public.film_category fc JOIN public.category c USING (category_id)) AS j WHERE j.name = 'Music'
SELECT joined.language_id FROM public.film JOIN public.language USING (language_id) AS joined LIMIT 3
SELECT f.title, x.title AS next_shorter FROM public.film f LEFT JOIN LATERAL (SELECT g.title FROM public.film g WHERE g.length < f.length ORDER BY g.length DESC LIMIT 1) x ON true
SELECT c.name, top.title, top.rate FROM public.category c CROSS JOIN LATERAL (SELECT f.title, f.rental_rate AS rate FROM public.film f JOIN public.film_category fc USING (film_id) WHERE fc.category_id = c.category_id ORDER BY f.rental_rate DESC, f.title FETCH FIRST 3 ROWS ONLY) AS top
SELECT s.n, f.title FROM generate_series(1, 5) AS s(n) LEFT JOIN public.film f ON f.film_id = s.n

-- groups
SELECT rating, avg(length)::numeric(6, 1) AS average, min(length), max(length), stddev(length), variance(length) FROM public.film GROUP BY rating HAVING count(*) > 5
SELECT rating, rental_duration, count(*) FROM public.film GROUP BY ROLLUP (rating, rental_duration) ORDER BY 1, 2
SELECT rating, rental_duration, count(*), grouping(rating, rental_duration) FROM public.film GROUP BY CUBE (rating, rental_duration)
SELECT store_id, active, count(*) FROM public.customer GROUP BY GROUPING SETS ((store_id, active), (store_id), ())
SELECT store_id, extract(year FROM create_date) AS y, count(*) FROM public.customer GROUP BY DISTINCT ROLLUP (store_id, create_date), ROLLUP (store_id)
SELECT rating, percentile_cont(0.5) WITHIN GROUP (ORDER BY length) AS median, percentile_disc(ARRAY[0.25, 0.75]) WITHIN GROUP (ORDER BY rental_rate) FROM public.film GROUP BY rating
SELECT mode() WITHIN GROUP (ORDER BY rental_duration) AS usual FROM public.film
SELECT rank(100) WITHIN GROUP (ORDER BY length), dense_rank(100) WITHIN GROUP (ORDER BY length), cume_dist(100::smallint) WITHIN GROUP (ORDER BY length) FROM public.film
SELECT store_id, count(*) FILTER (WHERE activebool) AS active, count(*) FILTER (WHERE NOT activebool) AS gone FROM public.customer GROUP BY store_id
SELECT string_agg(DISTINCT last_name, ', ' ORDER BY last_name) FROM public.actor WHERE last_name LIKE 'B%'
SELECT c.name, array_agg(f.title ORDER BY f.title) AS titles FROM public.category c JOIN public.film_category USING (category_id) JOIN public.film f USING (film_id) GROUP BY c.name
SELECT bool_and(activebool), bool_or(activebool), every(active = 1) FROM public.customer
SELECT corr(length, rental_rate), regr_slope(rental_rate, length), regr_intercept(rental_rate, length), covar_pop(length, rental_rate) FROM public.film
SELECT bit_and(rental_duration::int), bit_or(rental_duration::int), sum(DISTINCT rental_duration) FROM public.film
SELECT date_trunc('month', payment_date) AS month, sum(amount) AS income FROM public.payment GROUP BY 1 ORDER BY 1
SELECT width_bucket(length, 0, 200, 10) AS bucket, count(*) FROM public.film GROUP BY bucket ORDER BY bucket
SELECT rating, count(*) * 100.0 / sum(count(*)) OVER () AS share FROM public.film GROUP BY rating
SELECT left(title, 1) AS letter, count(*) FROM public.film GROUP BY letter HAVING count(*) BETWEEN 2 AND 50 ORDER BY count(*) DESC, letter
-- from 16
SELECT rating, any_value(title) FROM public.film GROUP BY rating

-- windows
SELECT title, rating, length, rank() OVER (PARTITION BY rating ORDER BY length DESC) FROM public.film
SELECT payment_id, amount, sum(amount) OVER (ORDER BY payment_date ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) AS so_far FROM public.payment
SELECT payment_date::date AS day, sum(amount), avg(sum(amount)) OVER (ORDER BY payment_date::date ROWS BETWEEN 6 PRECEDING AND CURRENT ROW) FROM public.payment GROUP BY payment_date::date
SELECT rental_id, rental_date, lag(rental_date) OVER w AS before, lead(rental_date, 1, now()) OVER w AS after FROM public.rental WINDOW w AS (PARTITION BY customer_id ORDER BY rental_date)
SELECT title, ntile(4) OVER (ORDER BY length), percent_rank() OVER (ORDER BY length), cume_dist() OVER (ORDER BY length) FROM public.film
SELECT title, first_value(title) OVER w, last_value(title) OVER w, nth_value(title, 2) OVER w FROM public.film WINDOW w AS (PARTITION BY rating ORDER BY length ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
SELECT q.* FROM (SELECT f.title, f.rating, row_number() OVER (PARTITION BY f.rating ORDER BY f.rental_rate DESC, f.film_id) AS place FROM public.film f) q WHERE q.place <= 3
SELECT customer_id, amount, sum(amount) OVER (PARTITION BY customer_id ORDER BY payment_date RANGE BETWEEN interval '7 days' PRECEDING AND CURRENT ROW) FROM public.payment
SELECT length, count(*) OVER (ORDER BY length GROUPS BETWEEN 1 PRECEDING AND 1 FOLLOWING EXCLUDE CURRENT ROW) FROM public.film
SELECT title, length - avg(length) OVER (PARTITION BY rating) AS from_average FROM public.film ORDER BY abs(length - avg(length) OVER (PARTITION BY rating)) DESC LIMIT 5
SELECT staff_id, count(*) FILTER (WHERE amount > 5) OVER (PARTITION BY staff_id) FROM public.payment LIMIT 10
SELECT DISTINCT ON (customer_id) customer_id, rental_date, inventory_id FROM public.rental ORDER BY customer_id, rental_date DESC
SELECT dense_rank() OVER (big ORDER BY title) FROM public.film WINDOW big AS (PARTITION BY rating)

-- common table expressions
WITH top AS (SELECT customer_id, sum(amount) AS total FROM public.payment GROUP BY customer_id ORDER BY total DESC LIMIT 10) SELECT c.first_name, c.last_name, top.total FROM top JOIN public.customer c USING (customer_id) ORDER BY top.total DESC
WITH long AS MATERIALIZED (SELECT film_id, title FROM public.film WHERE length > 150), rented AS NOT MATERIALIZED (SELECT i.film_id, count(*) AS times FROM public.rental r JOIN public.inventory i USING (inventory_id) GROUP BY i.film_id) SELECT long.title, rented.times FROM long LEFT JOIN rented USING (film_id)
WITH RECURSIVE days(day) AS (SELECT date '2022-01-01' UNION ALL SELECT day + 1 FROM days WHERE day < date '2022-01-31') SELECT d.day, count(p.payment_id) FROM days d LEFT JOIN public.payment p ON p.payment_date::date = d.day GROUP BY d.day ORDER BY d.day
WITH RECURSIVE n(i, f) AS (VALUES (1, 1::numeric) UNION ALL SELECT i + 1, f * (i + 1) FROM n WHERE i < 20) SELECT * FROM n
WITH RECURSIVE together(actor_id, steps) AS (SELECT 1, 0 UNION SELECT b.actor_id, t.steps + 1 FROM together t JOIN public.film_actor a ON a.actor_id = t.actor_id JOIN public.film_actor b ON b.film_id = a.film_id WHERE t.steps < 2) SELECT steps, count(DISTINCT actor_id) FROM together GROUP BY steps
WITH RECURSIVE walk(id, next) AS (SELECT city_id, city_id + 1 FROM public.city WHERE city_id = 1 UNION ALL SELECT c.city_id, c.city_id + 1 FROM public.city c JOIN walk w ON c.city_id = w.next WHERE c.city_id < 9) SEARCH DEPTH FIRST BY id SET place CYCLE id SET is_cycle USING path SELECT id, is_cycle FROM walk ORDER BY place
WITH film AS (SELECT * FROM public.film WHERE rating = 'G') SELECT count(*) FROM film
WITH a(x, y) AS (SELECT film_id, title FROM public.film LIMIT 5) SELECT y FROM a WHERE x > (WITH b AS (SELECT min(x) AS m FROM a) SELECT m FROM b)
WITH monthly AS (SELECT date_trunc('month', payment_date) AS m, sum(amount) AS s FROM public.payment GROUP BY 1) SELECT m, s, s - lag(s) OVER (ORDER BY m) AS change, round(100 * (s / lag(s) OVER (ORDER BY m) - 1), 1) AS percent FROM monthly
WITH counted AS (SELECT rating, count(*) AS n FROM public.film GROUP BY rating) SELECT * FROM counted WHERE n = (SELECT max(n) FROM counted)
WITH cohort AS (SELECT customer_id, min(rental_date)::date AS first_day FROM public.rental GROUP BY 1) SELECT c.first_day, count(DISTINCT r.customer_id) FROM cohort c JOIN public.rental r ON r.customer_id = c.customer_id AND r.rental_date < c.first_day + interval '30 days' GROUP BY c.first_day

-- set operations
SELECT first_name FROM public.actor UNION SELECT first_name FROM public.customer ORDER BY 1 LIMIT 10
SELECT last_name FROM public.actor INTERSECT ALL SELECT last_name FROM public.customer
SELECT film_id FROM public.film EXCEPT SELECT film_id FROM public.inventory
(SELECT title, length FROM public.film ORDER BY length LIMIT 1) UNION ALL (SELECT title, length FROM public.film ORDER BY length DESC LIMIT 1)
SELECT 'actor' AS what, count(*) FROM public.actor UNION ALL SELECT 'film', count(*) FROM public.film UNION ALL SELECT 'city', count(*) FROM public.city

-- dates and times
SELECT rental_id, age(return_date, rental_date) AS kept, return_date - rental_date AS same FROM public.rental WHERE return_date IS NOT NULL
SELECT extract(dow FROM rental_date) AS weekday, extract(epoch FROM return_date - rental_date) / 3600 AS hours FROM public.rental LIMIT 5
SELECT to_char(payment_date, 'YYYY-MM-DD HH24:MI') AS at, to_char(amount, 'FM990.00') FROM public.payment LIMIT 5
SELECT rental_date AT TIME ZONE 'Europe/Berlin' AS local, timezone('UTC', rental_date) AS utc FROM public.rental LIMIT 5
SELECT date_part('hour', rental_date) AS hour, count(*) FROM public.rental GROUP BY hour ORDER BY hour
SELECT * FROM public.rental WHERE rental_date >= date_trunc('week', now()) - interval '1 week' AND rental_date < date_trunc('week', now())
SELECT make_date(2022, 2, 28) + 1, make_interval(days => 10), make_timestamp(2022, 1, 1, 12, 0, 0), justify_days(interval '40 days')
SELECT (rental_date, return_date) OVERLAPS (timestamptz '2022-05-01', timestamptz '2022-06-01') FROM public.rental LIMIT 5
SELECT date_bin('15 minutes', rental_date, timestamptz '2001-01-01') AS slot, count(*) FROM public.rental GROUP BY slot
SELECT g::date AS day, count(r.rental_id) FROM generate_series(timestamp '2022-05-01', timestamp '2022-05-31', interval '1 day') AS g LEFT JOIN public.rental r ON r.rental_date::date = g::date GROUP BY g ORDER BY g
SELECT to_date('03 Mar 2022', 'DD Mon YYYY'), to_timestamp(1650000000), isfinite(now()), date '2022-03-01' - date '2022-02-01' AS days
SELECT payment_date::time, payment_date::date, interval '1 day 2 hours' * 3, interval '1' month FROM public.payment LIMIT 2
SELECT count(*) FROM public.payment WHERE payment_date <@ tstzrange('2022-02-01', '2022-03-01')
SELECT EXTRACT(QUARTER FROM payment_date) AS quarter, sum(amount) FROM public.payment GROUP BY 1
SELECT customer_id, max(rental_date) AS last, now() - max(rental_date) > interval '90 days' AS is_sleeping FROM public.rental GROUP BY customer_id
-- from 16
SELECT date_add(rental_date, interval '1 day', 'Europe/Berlin') FROM public.rental LIMIT 3
-- from 17
SELECT rental_date AT LOCAL FROM public.rental LIMIT 3

-- text
SELECT upper(title), lower(title), initcap(title), length(title), reverse(title), md5(title) FROM public.film LIMIT 5
SELECT substring(title FROM 1 FOR 5), substring(title FROM '^\w+'), position('A' IN title), overlay(title PLACING 'XX' FROM 1 FOR 2) FROM public.film LIMIT 5
SELECT trim(both ' ' FROM '  x '), ltrim('xxa', 'x'), rtrim('axx', 'x'), btrim(' a ')
SELECT lpad(film_id::text, 6, '0') AS code, rpad(title, 30, '.') AS line, repeat('*', 5) AS stars FROM public.film LIMIT 5
SELECT split_part(email, '@', 2) AS domain, count(*) FROM public.customer GROUP BY domain
SELECT regexp_replace(phone, '(\d{3})(\d+)', '\1-\2') AS phone, regexp_match(address, '\d+') AS number FROM public.address LIMIT 5
SELECT word, count(*) FROM public.film, regexp_split_to_table(lower(description), '\s+') AS word GROUP BY word ORDER BY count(*) DESC LIMIT 20
SELECT (regexp_matches(description, '[A-Z]\w+', 'g'))[1] AS name FROM public.film LIMIT 20
SELECT concat(first_name, ' ', last_name), concat_ws(', ', last_name, first_name), format('%s <%s>', first_name, email) FROM public.customer LIMIT 5
SELECT title FROM public.film WHERE title SIMILAR TO '(A|B)%' AND title NOT LIKE '%\_%' ESCAPE '\'
SELECT translate(title, 'AEIOU', '43102'), replace(title, ' ', '_'), starts_with(title, 'A'), title ^@ 'B', strpos(title, 'X') FROM public.film LIMIT 5
SELECT ascii('A'), chr(66), encode('abc'::bytea, 'hex'), decode('616263', 'hex'), quote_literal('it''s'), quote_ident('a b')
SELECT string_to_array(title, ' ') AS words, array_length(string_to_array(title, ' '), 1) FROM public.film LIMIT 5
SELECT part, place FROM string_to_table('a,b,c', ',') WITH ORDINALITY AS t(part, place)
SELECT left(title, 3), right(title, 3), char_length(title), octet_length(title), bit_length('a') FROM public.film LIMIT 2
SELECT E'tab\there', U&'\0041', $$dollar 'quoted'$$, 'a' || 'b' || 'c'::text WHERE 'x' LIKE 'x'
SELECT sha256(title::bytea), normalize('é', NFC), 'a' IS NFC NORMALIZED, unistr('\0041') FROM public.film LIMIT 1
SELECT 'Größe' AS umlaut, '日本' AS japan, 'naïve' ILIKE 'NAÏVE' AS same
SELECT regexp_count(title, 'A'), regexp_instr(title, 'B'), regexp_substr(title, '\w+'), regexp_like(title, '^A') FROM public.film LIMIT 3
SELECT to_number('12,345.6', '99G999D9'), to_hex(255), trim_scale(1.500)

-- full text
SELECT title FROM public.film WHERE fulltext @@ to_tsquery('english', 'shark & !crocodile')
SELECT title, ts_rank(fulltext, query) AS rank FROM public.film, plainto_tsquery('epic drama') AS query WHERE fulltext @@ query ORDER BY rank DESC LIMIT 10
SELECT ts_headline('english', description, websearch_to_tsquery('english', '"boat" or dog'), 'StartSel=<, StopSel=>') FROM public.film LIMIT 5
SELECT title, ts_rank_cd(setweight(to_tsvector('english', title), 'A') || setweight(to_tsvector('english', description), 'B'), phraseto_tsquery('english', 'mad scientist')) FROM public.film ORDER BY 2 DESC LIMIT 5
SELECT to_tsvector('simple'::regconfig, title), numnode('a & b'::tsquery), strip(fulltext), length(fulltext) FROM public.film LIMIT 3
SELECT lexeme, positions FROM public.film, unnest(fulltext) AS u(lexeme, positions, weights) WHERE film_id = 1
SELECT tsvector_to_array(fulltext), querytree('a & !b'::tsquery), 'fat:ab & cat'::tsquery FROM public.film LIMIT 1

-- arrays
SELECT title, special_features[1], special_features[1:2], cardinality(special_features) FROM public.film WHERE 'Trailers' = ANY (special_features)
SELECT feature, count(*) FROM public.film, unnest(special_features) AS feature GROUP BY feature
SELECT title FROM public.film WHERE special_features @> ARRAY['Commentaries', 'Trailers'] AND NOT special_features && ARRAY['Deleted Scenes']
SELECT array_to_string(special_features, ' / '), array_position(special_features, 'Trailers'), array_append(special_features, 'x'), array_remove(special_features, 'Trailers') FROM public.film LIMIT 5
SELECT ARRAY(SELECT title FROM public.film ORDER BY title LIMIT 3) AS first_three, ARRAY[[1, 2], [3, 4]] AS grid
SELECT t.i, t.v FROM unnest(ARRAY[1, 2], ARRAY['a', 'b']) AS t(i, v)
SELECT a.feature, a.place FROM public.film f CROSS JOIN LATERAL unnest(f.special_features) WITH ORDINALITY AS a(feature, place) WHERE f.film_id = 1
SELECT array_agg(DISTINCT x ORDER BY x) FROM unnest('{3,1,2,3}'::int[]) AS x
SELECT x, y FROM ROWS FROM (generate_series(1, 3), unnest(ARRAY['a', 'b', 'c'])) AS t(x, y)
SELECT generate_subscripts(special_features, 1) AS i, array_dims(special_features), array_cat(special_features, '{}') FROM public.film LIMIT 3

-- JSON
SELECT jsonb_build_object('title', title, 'cast', (SELECT jsonb_agg(jsonb_build_object('first', a.first_name, 'last', a.last_name)) FROM public.actor a JOIN public.film_actor fa USING (actor_id) WHERE fa.film_id = f.film_id)) FROM public.film f LIMIT 3
SELECT to_jsonb(c) - 'email' - 'address_id' FROM public.customer c LIMIT 3
SELECT row_to_json(q) FROM (SELECT title, rating FROM public.film LIMIT 3) q
SELECT json_agg(f.title ORDER BY f.title) FILTER (WHERE f.rating = 'G') FROM public.film f
SELECT jsonb_object_agg(name, category_id) FROM public.category
SELECT actor_id, film_info -> 'Comedy' -> 0 AS first, film_info ->> 'Drama' AS text, film_info #>> '{Horror,0}' AS path FROM public.actor_info LIMIT 5
SELECT k, jsonb_array_length(v) FROM public.actor_info, jsonb_each(film_info) AS e(k, v) WHERE actor_id = 1
SELECT e.key, e.value FROM public.actor_info a, jsonb_each_text(a.film_info) AS e(key, value) WHERE a.actor_id = 2
SELECT e.key, e.value FROM public.actor_info a CROSS JOIN LATERAL jsonb_each(a.film_info) e LIMIT 3
SELECT (jsonb_each('{"a": 1, "b": 2}'::jsonb)).key
SELECT actor_id FROM public.actor_info WHERE film_info ? 'Sports' AND film_info @> '{"Music": []}'
SELECT jsonb_path_query_array(film_info, '$.*[*] ? (@ starts with "A")') FROM public.actor_info LIMIT 3
SELECT actor_id FROM public.actor_info WHERE film_info @? '$.Comedy[*] ? (@ like_regex "^B")' OR jsonb_path_exists(film_info, '$.Drama')
SELECT jsonb_set('{"a": 1}'::jsonb, '{b}', '2'), '{"a": 1}'::jsonb || '{"c": 3}', jsonb_strip_nulls('{"a": null}'), jsonb_pretty('{"a": 1}')
SELECT x.a, x.b FROM jsonb_to_recordset('[{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]') AS x(a int, b text)
SELECT jsonb_typeof(value), value FROM jsonb_array_elements('[1, "a", null, {"x": true}]')
SELECT (('{"a": {"b": [1, 2]}}'::jsonb)['a']['b'][1])::int AS two, json_typeof('[]')
SELECT jsonb_object_keys(film_info) AS genre, count(*) FROM public.actor_info GROUP BY genre
-- from 16
SELECT JSON_OBJECT('id' : film_id, 'title' : title ABSENT ON NULL RETURNING jsonb), JSON_ARRAY(rating, length NULL ON NULL) FROM public.film LIMIT 3
-- from 16
SELECT JSON_OBJECTAGG(name : category_id), JSON_ARRAYAGG(name ORDER BY name RETURNING jsonb) FROM public.category
-- from 16
SELECT '{"a": 1}' IS JSON OBJECT AS object, '[1]' IS JSON ARRAY WITH UNIQUE KEYS AS list, JSON_ARRAY(SELECT name FROM public.category ORDER BY name) AS names
-- from 17
SELECT JSON_VALUE(film_info, '$.Comedy[0]' DEFAULT 'none' ON EMPTY), JSON_QUERY(film_info, '$.Drama' WITH WRAPPER), JSON_EXISTS(film_info, '$.Music') FROM public.actor_info LIMIT 3
-- from 17
SELECT jt.* FROM JSON_TABLE('[{"t": "A", "n": 1}, {"t": "B"}]', '$[*]' COLUMNS (place FOR ORDINALITY, t text PATH '$.t', n int PATH '$.n' DEFAULT 0 ON EMPTY)) AS jt
-- from 17
SELECT JSON('{"a": 1}'), JSON_SCALAR(1), JSON_SERIALIZE('{"a": 1}' RETURNING text)

-- ranges, numbers, other types
SELECT int4range(1, 10) * int4range(5, 15), numrange(1.5, 3) @> 2.0, lower(daterange('2022-01-01', '2022-02-01')), upper_inf(int4range(1, NULL))
SELECT customer_id, range_agg(tstzrange(rental_date, return_date)) FROM public.rental WHERE return_date > rental_date GROUP BY customer_id LIMIT 3
SELECT '{[1,3), [5,7)}'::int4multirange @> 6, range_merge(int4range(1, 2), int4range(8, 9)), isempty(int4range(1, 1))
SELECT round(avg(amount), 2), trunc(1.567, 1), ceil(1.2), floor(-1.2), sign(-3), mod(7, 3), power(2, 8), sqrt(2), ln(2), exp(1) FROM public.payment
SELECT random() < 2 AS surely, setseed IS NULL AS unset FROM (SELECT NULL::text AS setseed) s
SELECT gcd(12, 18), lcm(4, 6), factorial(5), degrees(pi()), div(7, 2), scale(1.50), 5 # 3, 5 & 3, 5 | 3, ~5, 1 << 4
SELECT point(1, 2) <-> point(4, 6) AS distance, box(point(0, 0), point(1, 1)) @> point(0.5, 0.5), area(circle(point(0, 0), 1))
SELECT host('192.168.1.5/24'::inet), network('192.168.1.0/24'::cidr), inet '10.1.2.3' << inet '10.0.0.0/8', '08:00:2b:01:02:03'::macaddr
SELECT uuid, gen_random_uuid() IS NOT NULL FROM public.rental LIMIT 1
SELECT B'101' & B'110', X'1F'::bit(8), true AND NOT false, (rating = 'R') IS TRUE, NULL IS UNKNOWN, pg_typeof(rental_rate) FROM public.film LIMIT 1
SELECT film_id, embedding FROM public.film_embedding ORDER BY film_id LIMIT 3

-- views, samples, other forms
SELECT * FROM public.sales_by_film_category WHERE total_sales > 1000
SELECT fid, title, category, price FROM public.film_list WHERE category = 'Family' AND price < 2
SELECT store, manager, total_sales FROM public.sales_by_store
SELECT * FROM public.customer_list WHERE country = 'Canada' AND notes = 'active'
SELECT * FROM public.film TABLESAMPLE BERNOULLI (10) REPEATABLE (42) WHERE rating = 'PG'
SELECT count(*) FROM ONLY public.film TABLESAMPLE SYSTEM (50)
SELECT ROW(film_id, title), (ROW(1, 2) = ROW(1, 2)) AS equal FROM public.film LIMIT 2
SELECT CASE rating::text WHEN 'G' THEN 1 WHEN 'PG' THEN 2 ELSE 3 END AS place, film_id FROM public.film ORDER BY place, film_id
SELECT tableoid IS NOT NULL AS is_there, ctid IS NULL AS is_gone FROM public.payment LIMIT 2
SELECT count(*) FROM public.payment_p2022_01 WHERE amount BETWEEN SYMMETRIC 5 AND 1
EXPLAIN SELECT * FROM public.film WHERE film_id = 1
EXPLAIN (VERBOSE, COSTS OFF, FORMAT JSON) SELECT count(*) FROM public.rental GROUP BY staff_id
SHOW server_version
SHOW TIME ZONE
SELECT table_name, column_name, data_type FROM information_schema.columns WHERE table_schema = 'public' ORDER BY table_name, ordinal_position
SELECT tc.table_name, kcu.column_name, ccu.table_name AS referenced FROM information_schema.table_constraints tc JOIN information_schema.key_column_usage kcu USING (constraint_schema, constraint_name) JOIN information_schema.constraint_column_usage ccu USING (constraint_schema, constraint_name) WHERE tc.constraint_type = 'FOREIGN KEY'
SELECT f.title FROM film f JOIN film_category fc ON fc.film_id = f.film_id JOIN category c ON c.category_id = fc.category_id WHERE c.name = 'Travel'
SELECT customer.first_name, sum(payment.amount) FROM customer JOIN payment ON payment.customer_id = customer.customer_id GROUP BY customer.customer_id, customer.first_name
